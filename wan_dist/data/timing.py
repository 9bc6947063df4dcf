"""Which frames of a clip are shown at a training frame rate.

Target stamps are k / fps after the start of a window, and each takes the frame nearest in time. 24 to 16 frames per
second therefore judders, as any such conversion without blending does.
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_FPS_RATIO: Final = 0.9
"""A source this much slower than the target is used frame by frame (and so plays up to 11 % faster); a slower one
would need repeated frames, which the model learns as stutter."""

MAX_GAP_FRAMES: Final = 4
"""Longest hole in a clip's time line, in frames of the target rate, that is bridged by the frames around it."""

_EPSILON: Final = 1e-6

REASONS: Final[dict[str, str]] = {
    "low_fps": f"frame rate under {MIN_FPS_RATIO} times data.fps; lower data.fps or set data.allow_duplicate_frames",
    "frame_gap": f"a hole of more than {MAX_GAP_FRAMES} frames; lower data.fps or set data.allow_duplicate_frames",
}
"""Why a clip's time line does not suit a frame rate, and what the user can change."""


def timing_problem(source_fps: float, max_gap_s: float, fps: float, allow_duplicate_frames: bool) -> str | None:
    """Return a key of `REASONS` if the clip would need repeated frames at `fps`, else None.

    Args:
        source_fps: mean frame rate of the clip, frames per second; 0 for an image.
        max_gap_s: longest time between two of its frames, seconds.
        fps: training frame rate, frames per second.
        allow_duplicate_frames: repeated frames are welcome.
    """
    if allow_duplicate_frames or source_fps == 0:
        return None
    if source_fps < MIN_FPS_RATIO * fps - _EPSILON:
        return "low_fps"
    return "frame_gap" if max_gap_s * fps > MAX_GAP_FRAMES + _EPSILON else None


def available_frames(num_frames: int, source_fps: float, fps: float, allow_duplicate_frames: bool) -> int:
    """Return how many frames the clip gives at `fps`.

    Args:
        num_frames: frames in the file.
        source_fps: mean frame rate of the clip, frames per second; 0 for an image.
        fps: training frame rate, frames per second.
        allow_duplicate_frames: a frame may be shown more than once.
    """
    if num_frames == 1 or source_fps == 0:
        return 1
    shown = math.floor((num_frames - 1) / source_fps * fps + 0.5 + _EPSILON) + 1
    return shown if allow_duplicate_frames else min(shown, num_frames)


def choose_frames(
    stamps_s: NDArray[np.float64], num_frames: int, fps: float, choice: float, allow_duplicate_frames: bool
) -> NDArray[np.int64]:
    """Return the frames to show, [num_frames], indices into `stamps_s` that never go back.

    Without `allow_duplicate_frames` they strictly increase: a frame that two stamps are nearest to serves the first,
    and the next frame serves the second.

    Args:
        stamps_s: [N], seconds, increasing.
        num_frames: frames wanted, at most `available_frames`.
        fps: training frame rate, frames per second.
        choice: where the window lies, in [0, 1): 0 is the clip's head, 0.5 its centre.
        allow_duplicate_frames: a frame may be shown more than once.
    """
    slack_s = max(0.0, float(stamps_s[-1] - stamps_s[0]) - (num_frames - 1) / fps)
    indices = _nearest(stamps_s, stamps_s[0] + choice * slack_s + np.arange(num_frames) / fps)
    if allow_duplicate_frames:
        return indices
    steps = np.arange(num_frames)
    indices = np.maximum.accumulate(indices - steps) + steps
    return np.minimum(indices, len(stamps_s) - num_frames + steps)


def consecutive_frames(available: int, num_frames: int, choice: float) -> NDArray[np.int64]:
    """Return indices of frames that follow each other in the file, [num_frames], whatever times they have.

    Args:
        available: frames in the file, at least `num_frames`.
        num_frames: frames wanted.
        choice: where the window lies, in [0, 1): 0 is the clip's head, 0.5 its centre.
    """
    places = available - num_frames + 1
    return min(int(choice * places), places - 1) + np.arange(num_frames)


def _nearest(stamps_s: NDArray[np.float64], wanted_s: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the nearest stamp for each wanted time; of two equally near ones, the earlier."""
    right = np.searchsorted(stamps_s, wanted_s).clip(1, max(1, len(stamps_s) - 1))
    left = right - 1
    right = np.minimum(right, len(stamps_s) - 1)
    later = (stamps_s[right] - wanted_s) < (wanted_s - stamps_s[left]) - _EPSILON
    return np.where(later, right, left)
