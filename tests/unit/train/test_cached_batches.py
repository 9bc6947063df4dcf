"""Batches from caches through a whole configuration: merged buckets, mixtures, tiles and batches of several clips."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from data_tools.app import app
from data_tools.cache import cache
from tests.jobs import pack_clips
from wan_dist.config.load import load_config
from wan_dist.data.batching import Batch
from wan_dist.data.family import open_family
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.shapes import draw_clips
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.parallel.dist import Ranks
from wan_dist.train.build_data import open_batches

SIZES = [[32, 32], [64, 32], [64, 64]]
# bf16 keeps 8 significant bits, so a stored mean is off by at most 2^-9 of itself; twice that after normalising.
ROUNDING = 2.0**-8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets and a model."""
    root = tmp_path_factory.mktemp("cached-batches")
    first = [*draw_clips(5, 32, 32)[:4], *draw_clips(5, 32, 64)[:1]]
    for name, clips in (("a", first), ("b", draw_clips(5, 32, 64, shapes=["triangle"])[:3])):
        (root / name).mkdir()
        pack_clips(root / name, clips, fps=8.0, shard_clips=2)
    make_tiny_pipeline("ti2v-5B", root / "model")
    return root


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Choosing a cache is collective."""
    store = tmp_path_factory.mktemp("rendezvous") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def write_config(folder: Path, name: str, **data: Any) -> Path:
    path = folder / f"{name}.yaml"
    values = {"sizes": SIZES, "num_frames": [5], "fps": 8.0, "decode": "thread", **data}
    document = {
        "version": 1,
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "variant": "ti2v-5B", "dtype": "fp32"},
        "data": values,
        "optim": {"lr": 1e-4},
        "train": {"num_steps": 2, "global_batch_size": 2, "micro_batch_size": 2},
    }
    path.write_text(yaml.safe_dump(document))
    return path


def run_cache(shards: Path, config: Path, **options: Any) -> None:
    """Run `wan-data cache` here; what it sets for the whole process, as a command may, is taken back."""
    options = {"only": None, "batch_size": 1, "num_workers": 2, "tiling": False, **options}
    root, own = logging.getLogger(), logging.getLogger("wan_dist")
    handlers, levels = list(root.handlers), (root.level, own.level)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        cache(shards, config=config, num_gpus=1, as_json=True, dry_run=False, **options)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


def read(config: Path, num_blocks: int, *overrides: str) -> list[Batch]:
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    batches, _ = open_batches(load_config(config, list(overrides)), ranks, torch.float32)
    try:
        found: list[Batch] = []
        for _, micro in batches.steps(0, 0):
            found += list(micro)
            if len(found) >= num_blocks:
                return found
    finally:
        batches.close()
    raise AssertionError("steps end")


def assert_alike(cached: list[Batch], online: list[Batch]) -> None:
    for ours, theirs in zip(cached, online, strict=True):
        assert (ours.keys, ours.bucket, ours.positions) == (theirs.keys, theirs.bucket, theirs.positions)
        assert torch.allclose(ours.text_embeds.float(), theirs.text_embeds.float(), rtol=ROUNDING, atol=1e-6)
        assert torch.allclose(ours.latents, theirs.latents, rtol=4 * ROUNDING, atol=0.02)


ONLINE = ("data.latents=none", "data.text_embeds=none")


def test_merged_buckets_and_mixtures_read_their_caches(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    a, b = folder / "a" / "shards", folder / "b" / "shards"
    merged = write_config(folder, "merged", shards=str(a), tail="merge")
    run_cache(a, merged)
    caplog.set_level(logging.INFO)
    assert_alike(read(merged, 6), read(merged, 6, *ONLINE))
    assert "latents: encoded online" in caplog.text  # by the second run
    verified = CliRunner().invoke(app, ["verify", str(a)])
    assert verified.exit_code == 0
    assert [line.endswith(": whole") for line in verified.stdout.splitlines()] == [True] * 3  # clips, latents, text
    assert "merged 1 clips" in caplog.text
    caplog.clear()
    mixed = [{"path": str(a), "repeats": 2}, {"path": str(b)}]
    mixture = write_config(folder, "mixture", shards=mixed)
    run_cache(a, mixture)
    run_cache(b, mixture)
    cached = read(mixture, 8)
    assert "latents: encoded online" not in caplog.text
    assert_alike(cached, read(mixture, 8, *ONLINE))
    caplog.clear()
    # Of several data sets merged together, none can be cached alone.
    both = write_config(folder, "both", shards=mixed, tail="merge")
    assert_alike(read(both, 8), read(both, 8, *ONLINE))
    assert "sorts the clips of all data sets together" in caplog.text


def test_batches_of_clips_and_tiles_change_little(folder: Path) -> None:
    a = folder / "a" / "shards"
    config = write_config(folder, "plain", shards=str(a))
    run_cache(a, config, only="latents")
    before = set(a.glob("latents-*"))
    run_cache(a, config, only="latents", tiling=True)
    (tiled,) = set(a.glob("latents-*")) - before
    assert open_family(tiled, "latents").fingerprint["vae"]["tiling"] is not None
    plain = next(p for p in before if open_family(p, "latents").fingerprint["rules"]["merge_below"] is None)
    whole, tiles = (FamilyReader(open_family(path, "latents")) for path in (plain, tiled))
    for row in range(2):
        # Clips smaller than a tile are one tile.
        assert torch.equal(whole.read(0, row)["latents"], tiles.read(0, row)["latents"])
    stored = {row: whole.read(0, row)["latents"].float() for row in range(2)}
    for tar in [*plain.glob("*.tar"), plain / "manifest.json", *plain.glob("journal/*.json")]:
        tar.unlink()
    run_cache(a, config, only="latents", batch_size=4)
    again = FamilyReader(open_family(plain, "latents"))
    for row, wanted in stored.items():
        # Sums in another order in fp32, then rounded to bf16: one unit in the last place.
        assert torch.allclose(again.read(0, row)["latents"].float(), wanted, rtol=2.0**-7, atol=1e-5)
