"""`wan-data cache` on real ranks: killed, resumed, the same bytes; and training from what it wrote."""

import hashlib
import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.conftest import Material, launch, read_rows
from tests.jobs import pack_clips
from tests.processes import BIN, Finished, pids_of_job, run_cli, run_program, start_program, wait_until
from wan_dist.data.shapes import draw_clips

NUM_CLIPS = 12

# The cache holds latents in bf16, whose rounding moves a value by at most 2^-9 of itself. The loss is the mean square
# of (prediction - noise + latents), about 2 here, so it moves by at most 2 x sqrt(2) x 2^-9 = 0.006, or 0.3 %, even if
# every rounding pointed the same way; measured were 0.01 %. Text is exact.
RELATIVE = 3e-3


@dataclass(frozen=True)
class Cached:
    shards: Path
    config: Path
    run_dir: Path
    result: dict[str, dict[str, object]]


def cache(*words: object) -> Finished:
    return run_program([BIN / "wan-data", "cache", *words])


def content(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def cached(material: Material) -> Cached:
    """Shards of one clip each, cached by one rank."""
    folder = material.folder / "to-cache"
    folder.mkdir()
    shards = pack_clips(folder, draw_clips(9, 64, 64)[:NUM_CLIPS], fps=8.0, shard_clips=1)
    shutil.copytree(shards, folder / "plain")
    config = material.config(
        "cached", model={"dtype": "fp32"}, data={"shards": str(shards)}, train={"num_steps": 2, "global_batch_size": 2}
    )
    done = cache(shards, "--config", config, "--num-gpus", 1, "--json")
    assert done.status == 0, done.stderr
    assert f"cache latents: {NUM_CLIPS}/{NUM_CLIPS} clips" in done.stderr
    families = {row["kind"]: row for row in json.loads(done.stdout)["families"]}
    assert {row["num_clips"] for row in families.values()} == {NUM_CLIPS}
    return Cached(shards, config, material.run_dir("cached"), families)


@pytest.mark.proof
def test_two_ranks_that_were_killed_go_on_and_write_what_one_rank_writes(cached: Cached, material: Material) -> None:
    shards = material.folder / "to-cache" / "plain"
    words = [BIN / "wan-data", "cache", shards, "--config", cached.config, "--num-gpus", 2, "--json"]
    process = start_program(words, material.folder / "cache.log")
    wait_until(lambda: list(shards.glob("latents-*/journal/*.json")), 240, "a finished shard")
    for pid in [process.pid, *pids_of_job(shards)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    wait_until(lambda: not pids_of_job(shards), 60, "every rank is gone")
    assert not list(shards.glob("latents-*/manifest.json"))
    before = len(list(shards.glob("latents-*/journal/*.json")))
    planned = cache(shards, "--config", cached.config, "--dry-run")
    assert f"{before} of {NUM_CLIPS} shards are finished" in planned.stdout
    resumed = run_program(words)
    assert resumed.status == 0, resumed.stderr
    latents = next(row for row in json.loads(resumed.stdout)["families"] if row["kind"] == "latents")
    assert latents["resumed_shards"] == before
    assert content(shards) == content(cached.shards)


def test_training_from_the_cache_needs_no_encoders_and_has_the_online_loss(cached: Cached, material: Material) -> None:
    bare = material.folder / "transformer-only"
    bare.mkdir()
    shutil.copy(material.model / "model_index.json", bare)
    shutil.copytree(material.model / "transformer", bare / "transformer")
    online_dir = material.run_dir("uncached")
    launch(cached.config, online_dir, f"run_dir={online_dir}", "data.latents=none", "data.text_embeds=none")
    launch(cached.config, cached.run_dir, f"model.path={bare}")
    online, from_cache = read_rows(online_dir), read_rows(cached.run_dir)
    assert [row["step"] for row in from_cache] == [1, 2]
    assert [row["loss"] for row in from_cache] == pytest.approx([row["loss"] for row in online], rel=RELATIVE)
    assert [row["loss"] for row in from_cache] != [row["loss"] for row in online]
    # Another cache, or none, is another run.
    refused = run_cli("train", cached.config, "data.latents=none", "train.num_steps=3")
    assert refused.status == 1
    assert "was saved with data_digest = " in refused.stderr


def test_a_cache_of_another_vae_is_refused_and_the_field_named(cached: Cached, material: Material) -> None:
    other = material.folder / "other-vae"
    shutil.copytree(material.model, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, weights, {"format": "pt"})
    run_dir = material.run_dir("stale")
    before = content(cached.shards)
    refused = run_cli("train", cached.config, f"model.path={other}", f"run_dir={run_dir}")
    assert refused.status == 2
    (line,) = refused.error_lines()
    assert str(cached.result["latents"]["folder"]) in line
    assert "vae.weights_sha256 was " in line
    assert "data.latents: none" in line
    assert not run_dir.exists()
    assert content(cached.shards) == before


def test_rules_that_leave_pixels_to_chance_are_refused_for_latents_only(cached: Cached) -> None:
    random = cache(cached.shards, "--config", cached.config, "--set", "data.crop=random", "--dry-run")
    assert random.status == 2
    assert "data.crop = random shows other pixels on every visit" in random.stderr
    text = cache(cached.shards, "--config", cached.config, "--set", "data.crop=random", "--only", "text", "--dry-run")
    assert text.status == 0, text.stderr
    assert f"{NUM_CLIPS} of {NUM_CLIPS} shards are finished" in text.stdout
