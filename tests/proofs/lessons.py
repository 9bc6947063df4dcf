"""What the memorisation proofs share: clips that have nothing in common, training, export, similarity."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from tests.jobs import pack_clips, write_config
from wan_dist.data.clips import ClipDataset
from wan_dist.data.shapes import ShapeClip, draw_random_clip
from wan_dist.models.wan.build import make_tiny_pipeline, measure_latents
from wan_dist.parallel.launch import deepspeed_command, run_ranks

NUM_FRAMES, FPS = 9, 8.0
OPTIM = {"lr": 5e-3, "betas": [0.9, 0.99], "weight_decay": 0.0, "schedule": "cosine", "warmup_steps": 30}


@dataclass(frozen=True)
class Lesson:
    """Packed clips, the tiny pipeline that learns them, and what the trainer reads of each clip.

    Attributes:
        shards: folder of the packed clips.
        model: folder of the pipeline.
        side: width and height, px.
        latents: normalised latents by the clip's name.
        frames: [F, H, W, 3] by the clip's name.
    """

    shards: Path
    model: Path
    side: int
    latents: dict[str, torch.Tensor]
    frames: dict[str, np.ndarray]


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0))


def encoded(vae: Any, frames: np.ndarray) -> torch.Tensor:
    """Normalised as diffusers' pipelines denormalise, by code of the proofs only."""
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(video).latent_dist.mean
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (raw - mean) / std


def farthest_pair(vae: Any, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The two of twelve drawn clips whose latents are most unlike."""
    drawn = [draw_random_clip(np.random.default_rng(seed), NUM_FRAMES, side, side) for seed in range(12)]
    latents = [encoded(vae, frames) for frames in drawn]
    pairs = [(abs(cosine(latents[i], latents[j])), i, j) for i in range(12) for j in range(i)]
    _, i, j = min(pairs)
    return drawn[i], drawn[j]


def blended(side: int, seed: int, ends: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Clips from one random picture to another, told by their numbers."""
    squares = np.random.default_rng(seed).choice([0, 255], size=(1 + max(map(max, ends)), 4, 4, 3))
    pictures = np.kron(squares, np.ones((1, side // 4, side // 4, 1)))
    share = np.r_[0.0, np.linspace(0.3, 1.0, NUM_FRAMES - 1)][:, None, None, None]
    return [((1 - share) * pictures[a] + share * pictures[b]).astype(np.uint8) for a, b in ends]


@torch.no_grad()
def let_time_through(model: Path) -> None:
    """Let the tiny random 16-channel VAE see later frames: of theirs, 95 % of what it gives comes from the first."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    for name, module in vae.encoder.named_modules():
        weight = getattr(module, "weight", None)
        if name.endswith("time_conv"):
            assert isinstance(weight, torch.Tensor)
            weight.zero_()
            weight[:, :, -1, 0, 0] = torch.eye(len(weight))
            module.bias.zero_()  # type: ignore[operator, union-attr]
        elif isinstance(weight, torch.Tensor) and weight.ndim == 5 and weight.shape[2] == 3:
            weight[:, :, :2] *= 0.3
            weight[:, :, 2] *= 1.7
    mean, std = measure_latents(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(model / "vae")


def make_lesson(
    folder: Path, variant: str, side: int, captions: Sequence[str], choose: Callable[[Any], Sequence[np.ndarray]]
) -> Lesson:
    """Make the pipeline, choose a clip per caption knowing its VAE, and pack them."""
    model = make_tiny_pipeline(variant, folder / "model", captions)
    if variant != "ti2v-5B":
        let_time_through(model)
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    chosen = choose(vae)
    clips = [ShapeClip(f"clip{n}", c, f, "", "", "") for n, (c, f) in enumerate(zip(captions, chosen, strict=True))]
    shards = pack_clips(folder, clips, fps=FPS)
    # h264 changed the pixels: what the trainer reads is the truth.
    dataset = ClipDataset.open(shards, sizes=[(side, side)], num_frames=[NUM_FRAMES], fps=FPS)
    samples = [dataset.load(0, 0, index, choice=0.0, crop_xy=(0.5, 0.5)) for index in range(len(clips))]
    frames = {sample.key: sample.frames for sample in samples}
    return Lesson(shards, model, side, {key: encoded(vae, f) for key, f in frames.items()}, frames)


def train(
    lesson: Lesson, folder: Path, breakage: str, num_steps: int, *, alone: bool = False, **sections: dict[str, Any]
) -> Path:
    """Train on two ZeRO-3 ranks, or on one, with one formula broken, or none, and return the run's folder."""
    data = {"shards": str(lesson.shards), "sizes": [[lesson.side, lesson.side]], "num_frames": [NUM_FRAMES]}
    config = write_config(
        folder / "config.yaml",
        run_dir=folder / "run",
        # fp32 without checkpointing costs half of bf16 on a CPU; the quickstart's proof trains in bf16 with it.
        model={"path": str(lesson.model), "dtype": "fp32", **sections.pop("model")},
        data={**data, "fps": FPS, "caption_dropout": 0.0, **sections.pop("data", {})},
        optim={**OPTIM, **sections.pop("optim", {})},
        train={"num_steps": num_steps, "global_batch_size": 8, "micro_batch_size": 4, "gradient_checkpointing": "none"},
        log={"every": 50},
        **sections,
    )
    program, env = ["tests.proofs.sabotaged_train", breakage, str(config)], {**os.environ, "OMP_NUM_THREADS": "1"}
    if alone:
        subprocess.run([sys.executable, "-m", *program], check=True, env=env)
    else:
        assert run_ranks(deepspeed_command(["0", "1"], program, port=free_port()), env=env) == 0
    return folder / "run"


def train_and_export(lesson: Lesson, folder: Path, breakage: str, num_steps: int, **options: Any) -> Path:
    """Train as `train` does and return the exported pipeline."""
    run, export = train(lesson, folder, breakage, num_steps, **options), folder / "export"
    run_wan_dist("consolidate", str(run), str(export))
    return export


def run_wan_dist(*arguments: str) -> None:
    """Run a command, which must succeed."""
    subprocess.run([sys.executable, "-m", "wan_dist", *arguments], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
