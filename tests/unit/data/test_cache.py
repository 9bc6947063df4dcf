"""Cached families: what is in them, how they are written, and what reading them gives."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from zlib_ng.zlib_ng import crc32

from tests.jobs import pack_clips
from wan_dist.core.errors import DataError, NotFiniteError
from wan_dist.data.batching import Batch, ClipBatches
from wan_dist.data.cache import CacheStopped, FamilyPlan, exclusive, finish, write_missing
from wan_dist.data.cache_sources import LatentsSource, Source, TextSource, trimmed
from wan_dist.data.cached import CachedSamples, padded
from wan_dist.data.clips import ClipDataset
from wan_dist.data.encode import Encoders, load_encoders
from wan_dist.data.family import EMPTY_NAME, Family, open_family
from wan_dist.data.family_reader import FamilyReader, parse_tensors, read_empty
from wan_dist.data.fingerprint import (
    differences,
    latent_parts,
    latents_fingerprint,
    text_fingerprint,
    text_identity,
    vae_identity,
)
from wan_dist.data.index import open_shards
from wan_dist.data.shapes import draw_clips
from wan_dist.data.verify_family import verify_family
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.variants import get_variant

RULES: dict[str, Any] = {
    "sizes": [(32, 32), (64, 32)],
    "num_frames": [5],
    "fps": 8.0,
    "frame_choice": "head",
    "crop": "center",
    "allow_duplicate_frames": False,
    "allow_upscale": False,
}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Material:
    shards: Path
    model: Path
    encoders: Encoders
    dataset: ClipDataset
    parts: tuple[str, ...]

    def latents(self, folder: Path, *, batch_size: int = 1) -> tuple[FamilyPlan, Source]:
        shards = open_shards(self.shards)
        plan = FamilyPlan.of(shards, latents_fingerprint(shards, RULES, vae_identity(self.model), self.parts))
        source = LatentsSource(self.dataset, self.encoders, self.parts, batch_size=batch_size, num_workers=2)
        return replace(plan, folder=folder / plan.folder.name), source

    def text(self, folder: Path, *, batch_size: int = 1) -> tuple[FamilyPlan, Source]:
        shards = open_shards(self.shards)
        plan = FamilyPlan.of(shards, text_fingerprint(shards, text_identity(self.model), "bf16"))
        return replace(plan, folder=folder / plan.folder.name), TextSource(shards, self.encoders, batch_size=batch_size)


@pytest.fixture(scope="module", params=["ti2v-5B", "i2v-A14B"])
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("cache")
    clips = [*draw_clips(5, 32, 32)[:5], *draw_clips(5, 32, 64, shapes=["triangle"])[:3]]
    shards = pack_clips(folder, clips, fps=8.0, shard_clips=3)
    model = make_tiny_pipeline(request.param, folder / "model")
    variant = get_variant(request.param)
    parts = latent_parts(needs_condition=variant.needs_condition, with_last=variant.needs_condition)
    return Material(shards, model, load_encoders(model, CPU, torch.bfloat16), ClipDataset.open(shards, **RULES), parts)


def write(plan: FamilyPlan, source: Source, rank: int = 0, world_size: int = 1, **options: Any) -> None:
    with exclusive(plan):
        write_missing(plan, source, rank=rank, world_size=world_size, **options)


@pytest.fixture(scope="module")
def families(material: Material, tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Family]:
    folder = tmp_path_factory.mktemp("families")
    plans = [material.latents(folder), material.text(folder)]
    for plan, source in plans:
        write(plan, source)
    return open_family(plans[0][0].folder, "latents"), open_family(plans[1][0].folder, "text")


def content(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def batches_of(material: Material, cached: CachedSamples | None, **changes: Any) -> list[Batch]:
    with_condition = "condition" in material.parts
    dropout = changes.pop("caption_dropout", 0.3)
    batches = ClipBatches(
        material.dataset,
        changes.pop("encoders", material.encoders),
        material.dataset.order(2, 64, 5),
        with_condition=with_condition,
        rank=0,
        world_size=1,
        micro_batch_size=2,
        seed=5,
        caption_dropout=dropout,
        num_workers=2,
        cache_bytes=0,
        max_bad_fraction=changes.pop("max_bad_fraction", 0.0),
        cached=cached,
        flf2v_probability=0.5,
    )
    try:
        return [batch for _, micro in islice(batches.steps(0, 0), 8) for batch in micro]
    finally:
        batches.close()


def cached_of(material: Material, families: tuple[Family, Family]) -> CachedSamples:
    num_shards = [len(shards.manifest.shards) for shards in material.dataset.shard_sets]
    return CachedSamples(num_shards, [FamilyReader(families[0])], [FamilyReader(families[1])])


def test_batches_from_the_cache_are_those_of_online_encoding(
    material: Material, families: tuple[Family, Family]
) -> None:
    # Without VAE and text encoder: reading the cache cannot fall back on them.
    bare = replace(material.encoders, vae=None, text_pipeline=None)
    online, cached = batches_of(material, None), batches_of(material, cached_of(material, families), encoders=bare)
    std, mean = material.encoders.latents_std, material.encoders.latents_mean
    # bf16 keeps 8 significant bits: a stored mean is off by at most 2^-9 of itself, before it is normalised.
    rounding = 2.0**-8
    given_last = [float(b.condition[s, 3, -1].min()) for b in online if b.condition is not None for s in range(2)]
    assert set(given_last) == ({0.0, 1.0} if "condition" in material.parts else set())
    for ours, theirs in zip(cached, online, strict=True):
        assert (ours.keys, ours.bucket, ours.positions) == (theirs.keys, theirs.bucket, theirs.positions)
        assert torch.equal(ours.text_embeds, theirs.text_embeds)
        raw = theirs.latents * std + mean
        assert bool(((ours.latents * std + mean - raw).abs() <= rounding * raw.abs() + 1e-6).all())
        assert ours.latents.dtype == theirs.latents.dtype
        if "condition" in material.parts:
            assert ours.condition is not None
            assert theirs.condition is not None
            assert torch.equal(ours.condition[:, :4], theirs.condition[:, :4])
            raw = theirs.condition[:, 4:] * std + mean
            found = ours.condition[:, 4:] * std + mean
            assert bool(((found - raw).abs() <= rounding * raw.abs() + 1e-6).all())


def test_members_are_the_un_normalised_means_and_trimmed_text(
    material: Material, families: tuple[Family, Family]
) -> None:
    latents, text = FamilyReader(families[0]), FamilyReader(families[1])
    clip = material.dataset.locate(0, 1, 0, choice=0.0, crop_xy=(0.5, 0.5))
    found = latents.read(clip.shard, clip.row)
    frames = material.dataset.frames(clip)[None]
    wanted = material.encoders.encode_parts(frames, material.parts)
    assert set(found) == set(material.parts)
    for part in material.parts:
        assert found[part].dtype == torch.bfloat16
        assert torch.equal(found[part], wanted[part][0].to(torch.bfloat16))
    online = material.encoders.encode_prompts(list(clip.captions))[0]
    embed = text.read(clip.shard, clip.row)["caption_0"]
    mask = material.encoders.text_pipeline.tokenizer(clip.captions[0]).attention_mask
    assert len(embed) == len(mask)
    assert torch.equal(padded(embed), online)
    empty = material.encoders.encode_prompts([""])[0]
    assert torch.equal(padded(read_empty(families[1])), empty)
    assert torch.equal(trimmed(empty), read_empty(families[1]))


READ_WITH_WEBDATASET = """
import json, sys
from webdataset.compat import WebDataset
for sample in WebDataset(sys.argv[1:], shardshuffle=False):
    print(json.dumps([sample["__key__"], sorted(k for k in sample if not k.startswith("__"))]))
"""


def test_plain_webdataset_reads_the_clips_keys(material: Material, families: tuple[Family, Family]) -> None:
    shards = open_shards(material.shards)
    keys = [row["key"].decode() for shard in range(len(shards.manifest.shards)) for row in shards.index(shard)]
    tars = [tar for family in families for tar in sorted(family.folder.glob("*.tar"))]
    assert [t.name.split("-")[1] for t in tars] == [s.name.split("-")[1] for s in shards.manifest.shards] * 2
    command = [sys.executable, "-c", READ_WITH_WEBDATASET, *map(str, tars)]
    done = subprocess.run(command, env={**os.environ, "WDS_SECURE": "1"}, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == keys * 2
    assert all(row[1] == ["safetensors"] for row in rows)


def test_verifying_names_each_damaged_sample(families: tuple[Family, Family], tmp_path: Path) -> None:
    for family in families:
        folder = shutil.copytree(family.folder, tmp_path / family.folder.name)
        assert verify_family(folder) == []
        (tar, *_), index = sorted(folder.glob("*.tar")), family.index(0)
        content = bytearray(tar.read_bytes())
        content[int(index["offset"][1]) + int(index["size"][1]) - 1] ^= 1
        content[-1] ^= 1
        tar.write_bytes(content)
        assert [(d.file, d.sample) for d in verify_family(folder)] == [(str(tar), index["key"][1].decode())]
        content[int(index["offset"][1]) + int(index["size"][1]) - 1] ^= 1
        tar.write_bytes(content)
        assert [d.what for d in verify_family(folder)] == ["SHA-256 differs, outside of all samples"]
        tar.write_bytes(content[:-1])
        assert [d.what for d in verify_family(folder)] == [f"has {len(content) - 1} bytes instead of {len(content)}"]


def test_verifying_a_family_is_not_ended_by_the_first_damage(families: tuple[Family, Family], tmp_path: Path) -> None:
    text = families[1]
    folder = shutil.copytree(text.folder, tmp_path / text.folder.name)
    first, second, third = sorted(folder.glob("*.tar"))[:3]
    first.unlink()
    index = text.index(1)
    second.write_bytes(second.read_bytes()[: int(index["offset"][-1]) + 1])
    content = bytearray(third.read_bytes())
    content[int(text.index(2)["offset"][0]) + int(text.index(2)["size"][0]) - 1] ^= 1
    third.write_bytes(content)
    (folder / "empty.safetensors").unlink()
    (folder / "family.json").write_text("{")
    found = [(Path(d.file).name, d.sample, d.what.partition(" ")[0]) for d in verify_family(folder)]
    assert found == [
        ("family.json", None, "cannot"),
        ("empty.safetensors", None, "is"),
        (first.name, None, "is"),
        (second.name, None, "has"),
        (second.name, index["key"][-1].decode(), "damaged"),
        (third.name, text.index(2)["key"][0].decode(), "damaged"),
    ]


def test_any_number_of_ranks_writes_the_same_bytes(
    material: Material, families: tuple[Family, Family], tmp_path: Path
) -> None:
    for family, (plan, source) in zip(families, (material.latents(tmp_path), material.text(tmp_path)), strict=True):
        with exclusive(plan):
            write_missing(plan, source, rank=1, world_size=2)  # helps with the shards that rank 0 did not begin
            write_missing(plan, source, rank=0, world_size=2)
        assert content(plan.folder) == content(family.folder)


def test_a_stopped_cache_goes_on_and_damage_is_written_again(
    material: Material, families: tuple[Family, Family], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, source = material.latents(tmp_path)
    seen: list[int] = []
    with pytest.raises(CacheStopped):
        write(plan, source, on_clips=seen.append, should_stop=lambda: len(seen) == 4)
    with pytest.raises(DataError, match="caching has not finished"):
        open_family(plan.folder, "latents")
    assert finish(plan) is None
    first = plan.folder / "latents-000000.tar"
    before = first.stat().st_mtime_ns
    (plan.folder / ".latents-000001.tar.tmp.1").write_bytes(b"left by a killed writer")
    write(plan, source)
    assert first.stat().st_mtime_ns == before
    assert content(plan.folder) == content(families[0].folder)
    damaged = bytearray(first.read_bytes())
    damaged[1000] ^= 1
    first.write_bytes(damaged)
    write(plan, source)
    assert "latents-000000.tar is damaged" in caplog.text
    assert content(plan.folder) == content(families[0].folder)


def test_two_commands_do_not_write_one_family(material: Material, tmp_path: Path) -> None:
    plan, _ = material.text(tmp_path)
    with exclusive(plan), pytest.raises(DataError, match="another `wan-data cache` is writing"), exclusive(plan):
        pass


@pytest.fixture
def copied(material: Material, families: tuple[Family, Family], tmp_path: Path) -> tuple[Family, int, int]:
    """A copy of the latents, and shard and row of one clip in it."""
    plan, source = material.latents(tmp_path)
    write(plan, source)
    return open_family(plan.folder, "latents"), 1, 1


def test_a_flipped_bit_and_a_clip_that_was_not_cached_are_said(copied: tuple[Family, int, int]) -> None:
    family, shard, row = copied
    place = family.index(shard)[row]
    with family.tar_path(shard).open("r+b") as stream:
        stream.seek(int(place["offset"]) + int(place["size"]) // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=r"latents-000001\.tar: sample \w+: damaged"):
        FamilyReader(family).read(shard, row)
    rows = np.array(family.index(shard))
    rows["size"][row] = 0
    np.save(family.folder / family.manifest.shards[shard].index_name, rows)
    with pytest.raises(DataError, match=r"was not cached; journal/000001\.json"):
        FamilyReader(family).read(shard, row)


def test_a_disk_that_fails_to_read_is_named(copied: tuple[Family, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    family, shard, row = copied
    reader = FamilyReader(family)
    assert reader.read(shard, row)

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(DataError, match=r"latents-000001\.tar: sample \w+: Input/output error; check the disk"):
        reader.read(shard, row)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, float("nan")]).bfloat16(), "holds NaN or infinity"),
        (torch.tensor([1.0, float("-inf")]).bfloat16(), "holds NaN or infinity"),
        (torch.tensor([1.0]), "not bf16 safetensors"),
    ],
)
def test_content_that_is_no_finite_bf16_is_refused(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=f"here: .*{message}"):
        parse_tensors(np.frombuffer(bytearray(save({"latents": tensor})), np.uint8), "here")


@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"\x05\0\0\0\0\0\0\0[1,2]", save({"a": torch.ones(2)})[:20]])
def test_bytes_that_are_no_safetensors_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not bf16 safetensors"):
        parse_tensors(np.frombuffer(bytearray(data), np.uint8), "here")


def test_parsing_gives_what_the_library_gives() -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(2, 2, 2).bfloat16(),
        "none": torch.zeros(0, 4).bfloat16(),
    }
    data = save(tensors, {"note": "ignored"})
    found = parse_tensors(np.frombuffer(bytearray(data), np.uint8), "here")
    assert set(found) == set(load(data))
    assert all(torch.equal(found[name], value) for name, value in load(data).items())


def test_a_bad_cached_sample_is_replaced_like_a_bad_clip(
    material: Material, families: tuple[Family, Family], copied: tuple[Family, int, int]
) -> None:
    family, shard, row = copied
    rows = np.array(family.index(shard))
    rows["crc32"][row] += 1
    np.save(family.folder / family.manifest.shards[shard].index_name, rows)
    key = rows["key"][row].decode()
    whole = batches_of(material, cached_of(material, families))
    found = batches_of(material, cached_of(material, (family, families[1])), max_bad_fraction=1.0)
    assert any(key in batch.keys for batch in whole)
    assert not any(key in batch.keys for batch in found)
    for ours, theirs in zip(found, whole, strict=True):
        assert all(a == b for a, b in zip(ours.keys, theirs.keys, strict=True) if b != key)


def test_latents_of_another_shape_are_refused(material: Material, families: tuple[Family, Family]) -> None:
    cached = cached_of(material, families)
    clip = material.dataset.locate(0, 1, 0, choice=0.0, crop_xy=(0.5, 0.5))
    larger = replace(clip.bucket, num_frames=9)
    with pytest.raises(DataError, match=r"latents has shape \[.*its bucket gives"):
        cached.read_latents(clip.shard, clip.row, larger, ("latents",))


def test_a_fingerprint_names_what_differs(material: Material, families: tuple[Family, Family], tmp_path: Path) -> None:
    made = families[0].fingerprint
    shards, vae = open_shards(material.shards), vae_identity(material.model)
    assert vae is not None

    def wanted(**changes: Any) -> list[str]:
        values: dict[str, Any] = {"rules": RULES, "vae": vae, "parts": material.parts, **changes}
        return differences(made, latents_fingerprint(shards, **values))

    assert wanted() == []
    assert wanted(rules={**RULES, "fps": 16.0}) == ["rules.fps was 8.0 and is 16.0"]
    assert wanted(rules={**RULES, "crop": "random"}) == ['rules.crop was "center" and is "random"']
    # More parts than a run needs do no harm; too few do.
    assert wanted(parts=("latents",)) == []
    assert wanted(parts=("latents", "more"))[0].startswith("parts was ")
    other = wanted(vae={**vae, "weights_sha256": "0" * 64})
    assert [text.split(" ")[0] for text in other] == ["vae.weights_sha256"]
    # Where the model has no VAE there is nothing to compare, and tiling is the family's own choice.
    assert wanted(vae=None) == []
    assert wanted(tiling={"tile_sample_min_height": 256}) == []
    more = pack_clips(tmp_path, draw_clips(5, 32, 32)[:2], fps=8.0)
    assert differences(made, latents_fingerprint(open_shards(more), RULES, vae, material.parts))[0].startswith("clips_")


def test_opening_a_family_checks_it(material: Material, tmp_path: Path) -> None:
    plan, source = material.text(tmp_path)
    write(plan, source)
    with pytest.raises(DataError, match="holds text, not latents"):
        open_family(plan.folder, "latents")
    (plan.folder / EMPTY_NAME).unlink()
    with pytest.raises(DataError, match=f"{EMPTY_NAME} is missing"):
        open_family(plan.folder, "text")
    write(plan, source)
    os.truncate(plan.folder / "text-000001.tar", 512)
    with pytest.raises(DataError, match=r"text-000001\.tar has 512 bytes instead of"):
        open_family(plan.folder, "text")
    manifest = plan.folder / "manifest.json"
    write(plan, source)
    manifest.write_text(manifest.read_text().replace('"max_tokens": 512', '"max_tokens": 511'))
    with pytest.raises(DataError, match="was edited"):
        open_family(plan.folder, "text")


def test_nan_is_refused_and_not_replaced(
    material: Material, families: tuple[Family, Family], copied: tuple[Family, int, int]
) -> None:
    family, shard, row = copied
    place = family.index(shard)[row]
    start, size = int(place["offset"]), int(place["size"])
    content = bytearray(family.tar_path(shard).read_bytes())
    content[start + size - 2 : start + size] = b"\xc0\x7f"  # NaN
    family.tar_path(shard).write_bytes(content)
    rows = np.array(family.index(shard))
    rows["crc32"][row] = crc32(content[start : start + size])
    np.save(family.folder / family.manifest.shards[shard].index_name, rows)
    # Whatever share of bad samples is allowed: an encoder that gives NaN is no sample's fault.
    with pytest.raises(NotFiniteError, match=rf"sample {place['key'].decode()}: .* holds NaN or infinity; run `wan-d"):
        batches_of(material, cached_of(material, (family, families[1])), max_bad_fraction=1.0)
    broken = replace(material.encoders, latents_mean=material.encoders.latents_mean * float("nan"))
    with pytest.raises(NotFiniteError, match=r"sample \w+: the VAE gave NaN or infinity; look at"):
        batches_of(material, None, encoders=broken, max_bad_fraction=1.0)
