"""Small real data sets and configs for tests that start training jobs."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from wan_dist.data.shapes import ShapeClip
from wan_dist.sample.video import write_mp4

DEFAULTS: dict[str, Any] = {
    "version": 1,
    "parallel": {"offload_optimizer": "cpu"},
    "checkpoint": {"save_every": 0, "keep_last": 2},
    "log": {"every": 1},
}


def pack_clips(folder: Path, clips: Sequence[ShapeClip], *, fps: float, shard_clips: int = 10_000) -> Path:
    """Write drawn clips as mp4 with captions, pack them with the real command, and return the shards' folder."""
    for clip in clips:
        write_mp4(folder / "clips" / f"{clip.name}.mp4", clip.frames, fps)
        (folder / "clips" / f"{clip.name}.txt").write_text(clip.caption)
    command = [sys.executable, "-m", "data_tools", "pack", str(folder / "clips"), str(folder / "shards")]
    command += ["--shard-clips", str(shard_clips)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "shards"


def write_config(path: Path, **sections: Any) -> Path:
    """Write a training config: the given sections over `DEFAULTS`."""
    merged: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in DEFAULTS.items()}
    for key, value in sections.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else str(value)
    path.write_text(yaml.safe_dump(merged))
    return path
