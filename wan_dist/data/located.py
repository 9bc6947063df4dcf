"""One clip as one training sample."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.buckets import Bucket


@dataclass(frozen=True)
class LocatedClip:
    """One clip as one training sample will see it, not yet decoded.

    Attributes:
        key: its key in the shard.
        captions: at least one.
        cache_key: names exactly the pixels of `ClipDataset.frames`.
        bucket: the shape of its frames.
        shard: shard number.
        row: row in the shard's index.
        choice: place of the window in time, in [0, 1).
        crop_xy: place of the crop, in [0, 1) along width and height.
        fps: frames per second at which it is shown.
    """

    key: str
    captions: tuple[str, ...]
    cache_key: str
    bucket: Bucket
    shard: int
    row: int
    choice: float
    crop_xy: tuple[float, float]
    fps: float


@dataclass(frozen=True)
class ClipSample:
    """One training sample.

    Attributes:
        key: its key in the shard.
        captions: at least one.
        frames: [F, H, W, 3], uint8 RGB.
        cache_key: names exactly these pixels; what is computed from them may be kept under it.
    """

    key: str
    captions: tuple[str, ...]
    frames: NDArray[np.uint8]
    cache_key: str
