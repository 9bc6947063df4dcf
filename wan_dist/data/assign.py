"""Which clips of a shard go to which bucket, and why others go to none."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from wan_dist.core import buckets as bucket_rules
from wan_dist.core.buckets import Bucket, assign_bucket
from wan_dist.data import timing

DROP_REASONS: Final = {**bucket_rules.REASONS, **timing.REASONS}
"""Why a clip goes to no bucket, and what the user can change."""

FrameChoice = Literal["head", "center", "random", "chunk", "uniform", "native"]

_FIXED_CHOICES: Final = {"head": 0.0, "center": 0.5, "uniform": 0.0}


@dataclass(frozen=True)
class ClipRules:
    """How clips become samples; the fields of `wan_dist.config.schema.DataConfig` of the same names.

    Attributes:
        sizes: (width, height) in px of the spatial buckets.
        num_frames: frames of the temporal buckets.
        fps: frames per second.
        frame_choice: which part of a longer clip is used.
        crop: which part is kept after the cover-resize.
        allow_duplicate_frames: use clips of too low a frame rate.
        allow_upscale: use clips smaller than their bucket.
    """

    sizes: tuple[tuple[int, int], ...]
    num_frames: tuple[int, ...]
    fps: float
    frame_choice: FrameChoice
    crop: Literal["center", "random"]
    allow_duplicate_frames: bool
    allow_upscale: bool

    @property
    def consecutive(self) -> bool:
        """Whether frames follow each other in the file, instead of standing at equal times."""
        return self.frame_choice == "native"

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return json.loads(json.dumps(self.__dict__))


@dataclass(frozen=True)
class Assigned:
    """The clips of one shard, sorted.

    Attributes:
        rows: for each bucket the rows of the shard's index, ascending, int64.
        drops: clips in no bucket, by reason.
    """

    rows: tuple[NDArray[np.int64], ...]
    drops: dict[str, int]


def assign_clips(index: NDArray[Any], rules: ClipRules, num_buckets: int) -> Assigned:
    """Return which clips of a shard's index go to which bucket of `make_buckets(rules.sizes, rules.num_frames)`."""
    fields = index[["width", "height", "num_frames", "fps", "max_gap_s"]]
    # Clips of a data set share few sizes and lengths; the rules are applied once to each.
    kinds, kind_of = np.unique(fields, return_inverse=True)
    placed = [
        place_clip(
            int(k["width"]), int(k["height"]), int(k["num_frames"]), float(k["fps"]), float(k["max_gap_s"]), rules
        )
        for k in kinds
    ]
    drops: Counter[str] = Counter()
    for place, count in zip(placed, np.bincount(kind_of, minlength=len(kinds)), strict=True):
        if isinstance(place, str):
            drops[place] += int(count)
    bucket_of = np.array([p if isinstance(p, int) else -1 for p in placed], np.int64)[kind_of]
    return Assigned(tuple(np.flatnonzero(bucket_of == bucket) for bucket in range(num_buckets)), dict(drops))


def time_window(
    num_frames: int, source_fps: float, shape: Bucket, rules: ClipRules, choice: float
) -> tuple[float, float]:
    """Return the frame rate at which a clip is shown, frames per second, and the place of its window in [0, 1).

    Args:
        num_frames: frames of the clip.
        source_fps: its mean frame rate, frames per second; 0 for an image.
        shape: its bucket.
        rules: how clips become samples.
        choice: draw from [0, 1) that places the window in time where that is left to chance.
    """
    fps, mode = rules.fps, rules.frame_choice
    span_s = (num_frames - 1) / source_fps if source_fps else 0.0
    if source_fps and mode == "native":
        fps = source_fps
    elif source_fps and mode == "uniform" and shape.num_frames > 1:
        fps = (shape.num_frames - 1) / span_s
    if mode == "chunk":
        # Chunks lie end to end from the head of the clip; what is left of it is never used.
        slack_s = max(0.0, span_s - (shape.num_frames - 1) / fps)
        num_chunks = int(slack_s * fps / shape.num_frames + 1e-6) + 1
        start_s = int(choice * num_chunks) * shape.num_frames / fps
        return fps, min(start_s / slack_s, 1.0) if slack_s else 0.0
    return fps, _FIXED_CHOICES.get(mode, choice)


def explain_drops(drops: dict[str, int], indexes: Sequence[NDArray[Any]]) -> str:
    """Say why clips were left out, and what the clips of these indexes are like."""
    reasons = "; ".join(f"{count} {why}: {DROP_REASONS[why]}" for why, count in sorted(drops.items()))
    rows = np.concatenate([np.asarray(index) for index in indexes])
    ranges = (
        f"{rows[name].min():.4g} to {rows[name].max():.4g} {unit}"
        for name, unit in (("width", "px wide"), ("height", "px high"), ("num_frames", "frames"), ("fps", "fps"))
    )
    return f"{reasons}. The clips have {', '.join(ranges)}"


def place_clip(
    width: int, height: int, num_frames: int, source_fps: float, max_gap_s: float, rules: ClipRules
) -> int | str:
    """Return the bucket of a clip, or a key of `DROP_REASONS`.

    Args:
        width: as shown, px.
        height: as shown, px.
        num_frames: frames of the clip.
        source_fps: its mean frame rate, frames per second; 0 for an image.
        max_gap_s: longest time between two of its frames, seconds.
        rules: how clips become samples.
    """
    if rules.frame_choice == "uniform":
        available = num_frames
    else:
        fps = source_fps if rules.frame_choice == "native" else rules.fps
        problem = timing.timing_problem(source_fps, max_gap_s, fps, rules.allow_duplicate_frames)
        if problem:
            return problem
        available = timing.available_frames(num_frames, source_fps, fps, rules.allow_duplicate_frames)
    return assign_bucket(width, height, available, rules.sizes, rules.num_frames, rules.allow_upscale)
