"""Masks beside clips: packed, cropped and timed like their clips, reduced to latents, cached or read online."""

import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.data.batching import Batch, ClipBatches
from wan_dist.data.cache import FamilyPlan, exclusive, write_missing
from wan_dist.data.cache_sources import LatentsSource, TextSource
from wan_dist.data.cached import CachedSamples
from wan_dist.data.clips import ClipDataset
from wan_dist.data.encode import Encoders, load_encoders
from wan_dist.data.family import open_family
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.fingerprint import latents_fingerprint, text_fingerprint, text_identity, vae_identity
from wan_dist.data.index import open_shards
from wan_dist.data.pack import pack_clips
from wan_dist.data.reindex import index_tar
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.condition import latent_mask
from wan_dist.sample.video import write_mp4
from wan_dist.train.objective import Objective

NUM_FRAMES, SIDE, WIDE = 5, 64, 128
RULES: dict[str, Any] = {"sizes": [(SIDE, SIDE)], "num_frames": [NUM_FRAMES], "fps": 8.0}


def noise_clip(seed: int, num_frames: int = 12) -> np.ndarray:
    # Wider than the bucket, so that a crop moves; longer, so that the window in time matters.
    return np.random.default_rng(seed).integers(0, 256, (num_frames, SIDE, WIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Clips `still`, `moving` and `plain` with a png, an mp4 and no mask, and masks that are refused."""
    folder = tmp_path_factory.mktemp("masks")
    clips = folder / "clips"
    clips.mkdir()
    for number, name in enumerate(("still", "moving", "plain", "tall", "short")):
        write_mp4(clips / f"{name}.mp4", noise_clip(number), 8.0)
        (clips / f"{name}.txt").write_text(name)
    half = np.zeros((SIDE, WIDE, 3), np.uint8)
    half[:, WIDE // 2 :] = 255  # of the centre crop too, the right half is white
    Image.fromarray(half[::2, ::2]).save(clips / "still.mask.png")
    moving = np.stack([np.full((SIDE, WIDE, 3), 255 if n == 0 else 0, np.uint8) for n in range(12)])
    write_mp4(clips / "moving.mask.mp4", moving, 8.0)
    Image.fromarray(half[:, :32]).save(clips / "tall-masklabel.png")
    write_mp4(clips / "short.mask.mp4", moving[:7], 8.0)
    Image.fromarray(half).save(clips / "nobody.mask.png")
    command = [sys.executable, "-m", "data_tools", "pack", str(clips), str(folder / "shards")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return folder / "shards", (folder / "shards" / "rejects.jsonl").read_text() + done.stderr


def test_masks_that_do_not_fit_are_rejected_with_their_clip(packed: tuple[Path, str]) -> None:
    shards, said = packed
    keys = [row["key"].decode() for row in open_shards(shards).index(0)]
    assert sorted(keys) == ["moving", "plain", "still"]
    assert "its mask is 32x64 px, the clip 128x64; give it the clip's aspect ratio" in said
    assert "its mask has 7 frames at 8 fps, the clip 12 at 8; export both alike" in said
    assert "no clip nobody beside it" in said
    assert (said.count('"bad_mask"'), said.count('"lone_mask"')) == (2, 1)


def test_masks_in_tars_are_packed_with_their_clips(packed: tuple[Path, str], tmp_path: Path) -> None:
    shards, _ = packed
    again = pack_clips(shards, tmp_path / "again", source_format="tars")
    assert (again.num_clips, again.rejects) == (3, {})
    before, after = open_shards(shards), open_shards(tmp_path / "again")
    masks = [{row["key"].split(b"_")[-1]: row["mask_crc32"] for row in found.index(0)} for found in (before, after)]
    assert masks[0] == masks[1]
    assert sum(row["mask_size"] > 0 for row in after.index(0)) == 2


def test_a_lost_index_is_made_anew_with_its_masks(packed: tuple[Path, str]) -> None:
    opened = open_shards(packed[0])
    content, rejects = index_tar(opened.tar_path(0))
    assert rejects == []
    assert content == (packed[0] / opened.manifest.shards[0].index_name).read_bytes()


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Encoders]:
    model = make_tiny_pipeline("ti2v-5B", tmp_path_factory.mktemp("model") / "tiny")
    return model, load_encoders(model, torch.device("cpu"), torch.float32)


def batches_of(
    dataset: ClipDataset, encoders: Encoders, cached: CachedSamples | None, masks: bool = True
) -> list[Batch]:
    batches = ClipBatches(
        dataset,
        encoders,
        dataset.order(3, 64, 5),
        with_condition=False,
        rank=0,
        world_size=1,
        micro_batch_size=3,
        seed=5,
        caption_dropout=0.0,
        num_workers=1,
        cache_bytes=1 << 20,
        max_bad_fraction=0.0,
        cached=cached,
        with_masks=masks,
    )
    try:
        return [batch for _, micro in islice(batches.steps(0, 0), 2) for batch in micro]
    finally:
        batches.close()


def test_masks_follow_their_clips_online_and_from_the_cache(
    packed: tuple[Path, str], encoders: tuple[Path, Encoders], tmp_path: Path
) -> None:
    model, encoder = encoders
    dataset, shards = ClipDataset.open(packed[0], **RULES), open_shards(packed[0])
    online = batches_of(dataset, encoder, None)
    for batch in online:
        assert batch.loss_mask is not None
        masks = dict(zip(batch.keys, batch.loss_mask, strict=True))
        assert masks["plain"].shape == (1, 2, 4, 4)
        assert torch.equal(masks["plain"], torch.ones(1, 2, 4, 4))
        # The right half of the centre crop is white, whatever frame; half the clip's size, the edge is blurred.
        assert float(masks["still"][..., 2:].min()) > 0.95
        assert float(masks["still"][..., :2].max()) < 0.05
        # Only the first frame is white, which is the first latent's whole and none of the second's four.
        assert float(masks["moving"][:, 0].min()) > 0.98
        assert float(masks["moving"][:, 1].max()) < 0.02
    latents = latents_fingerprint(shards, RULES, vae_identity(model), ("latents",))
    text = text_fingerprint(shards, text_identity(model), "fp32")
    sources = (
        LatentsSource(dataset, encoder, ("latents",), batch_size=2, num_workers=1),
        TextSource(shards, encoder, batch_size=2),
    )
    readers = []
    for fingerprint, source in zip((latents, text), sources, strict=True):
        plan = FamilyPlan(shards, fingerprint, tmp_path / fingerprint["kind"])
        with exclusive(plan):
            write_missing(plan, source, rank=0, world_size=1)
        readers.append(FamilyReader(open_family(plan.folder, plan.kind)))
    cached = batches_of(dataset, encoder, CachedSamples([1], readers[:1], readers[1:]))
    for ours, theirs in zip(cached, online, strict=True):
        assert ours.keys == theirs.keys
        assert ours.loss_mask is not None
        assert theirs.loss_mask is not None
        assert float((ours.loss_mask - theirs.loss_mask).abs().max()) <= 2.0**-8  # bf16
    assert all(batch.loss_mask is None for batch in batches_of(dataset, encoder, None, masks=False))


def test_latents_count_by_the_share_of_their_pixels() -> None:
    frames = torch.zeros(5, 4, 8, 3, dtype=torch.uint8)
    frames[0, :, :2] = 255  # half of the left latent's one frame
    frames[1:3, :, 4:] = 255  # the right latent in two of four frames
    found = latent_mask(frames, 5, (4, 4))
    assert torch.equal(found, torch.tensor([[[[0.5, 0.0]], [[0.0, 0.5]]]]))
    assert torch.equal(latent_mask(frames[:1], 9, (4, 4)), found[:, :1].expand(1, 3, 1, 2))


class _Zero(torch.nn.Module):
    def forward(self, **inputs: Any) -> tuple[torch.Tensor]:
        return (torch.zeros_like(inputs["hidden_states"]),)


@pytest.mark.parametrize("minimum", [0.0, 0.25, 1.0])
def test_the_loss_is_the_mean_weighted_by_the_mask(minimum: float) -> None:
    latents = torch.randn(2, 48, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    mask[1] = 1.0
    batch = Batch(("a", "b"), 0, (0, 1), latents, torch.zeros(2, 512, 8), None, loss_mask=mask)
    objective = Objective(SigmaSampler(shift=5.0), torch.float32, 3, mask_min_weight=minimum, i2v_probability=1.0)
    terms = objective.loss(_Zero(), batch)
    squared = ((objective.draw_noise(batch) - latents) ** 2)[:, :, 1:]  # the first frame is given
    weights = (minimum + (1 - minimum) * mask)[:, :, 1:].expand_as(squared)
    for n in range(2):
        expected = float((squared[n] * weights[n]).sum() / weights[n].sum())
        assert float(terms.sample_losses[n]) == pytest.approx(expected, rel=1e-5)
    assert float(terms.sample_losses[1]) == pytest.approx(float(squared[1].mean()), rel=1e-5)
