"""The trainer teaches two clips to a tiny model; diffusers' own sampler must give each back for its caption.

This fails if the velocity's sign, the timestep's scale, the shift or the normalisation is wrong, which is shown by
breaking each once.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from tests.jobs import pack_clips, write_config
from wan_dist.data.clips import ClipDataset
from wan_dist.data.shapes import ShapeClip, draw_random_clip
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.parallel.launch import deepspeed_command, run_ranks

pytestmark = pytest.mark.proof

PROGRAM = Path(__file__).with_name("sabotaged_train.py")
CAPTIONS = ("a red circle moves up", "a blue square moves to the left")
SIZE = {"width": 64, "height": 64, "num_frames": 9}
NUM_STEPS = 700


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def _latents(vae, frames: np.ndarray) -> torch.Tensor:
    """Normalised as diffusers' pipelines denormalise, by code of this test only."""
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(video).latent_dist.mean
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (raw - mean) / std


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Two clips whose latents have nothing in common, their shards, a tiny pipeline and the latents by caption."""
    folder = tmp_path_factory.mktemp("memorisation")
    model = make_tiny_pipeline("ti2v-5B", folder / "model", CAPTIONS)
    vae: Any = WanPipeline.from_pretrained(model).vae
    drawn = [draw_random_clip(np.random.default_rng(seed), 9, 64, 64) for seed in range(12)]
    encoded = [_latents(vae, frames) for frames in drawn]
    pairs = [(abs(_cosine(encoded[i], encoded[j])), i, j) for i in range(12) for j in range(i)]
    _, first, second = min(pairs)
    clips = [
        ShapeClip(f"clip{n}", caption, drawn[i], "", "", "")
        for n, (i, caption) in enumerate(zip((first, second), CAPTIONS, strict=True))
    ]
    shards = pack_clips(folder, clips, fps=8)
    # h264 changed the pixels: what the trainer reads is the truth.
    dataset = ClipDataset.open(shards, sizes=[(64, 64)], num_frames=[9], fps=8.0)
    truth = {}
    for index in range(2):
        clip = dataset.load(0, 0, index, choice=0.0, crop_xy=(0.5, 0.5))
        truth[clip.captions[0]] = _latents(vae, clip.frames)
    assert set(truth) == set(CAPTIONS)
    assert abs(_cosine(*truth.values())) < 0.2
    return shards, model, truth


def _memorise(lesson, folder: Path, breakage: str) -> dict[tuple[str, str], float]:
    """Train, consolidate, sample; return the cosine of each caption's sample with each clip's latents."""
    shards, model, truth = lesson
    config = write_config(
        folder / "config.yaml",
        run_dir=folder / "run",
        # fp32 without checkpointing costs half of bf16 on a CPU; the quickstart's proof trains in bf16 with it.
        model={"path": str(model), "variant": "ti2v-5B", "dtype": "fp32"},
        data={"shards": str(shards), "sizes": [[64, 64]], "num_frames": [9], "fps": 8.0, "caption_dropout": 0.0},
        optim={"lr": 5e-3, "betas": [0.9, 0.99], "weight_decay": 0.0, "schedule": "cosine", "warmup_steps": 30},
        train={"num_steps": NUM_STEPS, "global_batch_size": 8, "micro_batch_size": 4, "gradient_checkpointing": "none"},
        log={"every": 50},
    )
    command = deepspeed_command(["0", "1"], ["tests.proofs.sabotaged_train", breakage, str(config)], port=_free_port())
    assert run_ranks(command, env={**os.environ, "OMP_NUM_THREADS": "1"}) == 0
    export = folder / "export"
    subprocess.run([sys.executable, "-m", "wan_dist", "consolidate", str(folder / "run"), str(export)], check=True)
    pipeline: Any = WanPipeline.from_pretrained(export)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.flow_shift == 5.0
    similarity = {}
    for seed, caption in enumerate(CAPTIONS):
        sample = pipeline(
            caption,
            **SIZE,
            num_inference_steps=25,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).frames
        for other in CAPTIONS:
            similarity[caption, other] = _cosine(sample.float(), truth[other])
    print(breakage, similarity)
    return similarity


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _memorised(similarity: dict[tuple[str, str], float]) -> bool:
    return all(cos > 0.95 if asked == clip else abs(cos) < 0.2 for (asked, clip), cos in similarity.items())


def test_each_caption_gives_its_clip_back(lesson, tmp_path):
    similarity = _memorise(lesson, tmp_path, "none")
    assert _memorised(similarity), similarity


@pytest.mark.parametrize("breakage", ["velocity sign", "timestep scale", "shift applied backwards", "normalisation"])
def test_a_broken_formula_is_noticed(lesson, tmp_path, breakage):
    similarity = _memorise(lesson, tmp_path, breakage)
    assert not _memorised(similarity), similarity
