"""Training shapes and which of them a clip goes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

ASPECT_TOLERANCE = 0.05
"""Sizes whose aspect ratio is this near to the best one, in log units, count as equally good: about 5 % more crop is
a smaller loss than half the resolution (1280x720 and 832x480 differ by 0.025)."""

REASONS: dict[str, str] = {
    "too_short": "fewer frames than the shortest of data.num_frames; add a smaller one (1 admits images)",
    "too_small": "smaller than its size in data.sizes; add a smaller size or set data.allow_upscale",
}
"""Why a clip goes to no bucket, and what the user can change."""

FIXED_RULES = ("head", "center", "uniform")
"""Values of `data.frame_choice` and `data.crop` that show the same pixels on every visit."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One training shape: width in px, height in px, frames."""

    width: int
    height: int
    num_frames: int


def make_buckets(sizes: Sequence[tuple[int, int]], num_frames: Sequence[int]) -> tuple[Bucket, ...]:
    """Return every (width, height) in px with every length in frames, sizes outermost."""
    return tuple(Bucket(width, height, frames) for width, height in sizes for frames in num_frames)


def assign_bucket(
    width: int,
    height: int,
    available_frames: int,
    sizes: Sequence[tuple[int, int]],
    num_frames: Sequence[int],
    allow_upscale: bool,
) -> int | str:
    """Return the clip's index into `make_buckets(sizes, num_frames)`, or a key of `REASONS`.

    The length is the longest that the clip fills. The size is the one with the nearest aspect ratio by
    |log(aspect)|; among those nearly as near, the largest that needs no enlarging.

    Args:
        width: display width of the clip, px.
        height: display height of the clip, px.
        available_frames: frames at the training frame rate; 1 for an image.
        sizes: (width, height) of the spatial buckets, px.
        num_frames: frames of the temporal buckets.
        allow_upscale: enlarge a clip that is smaller than every size near its aspect ratio.
    """
    filled = [frames for frames in num_frames if frames <= available_frames]
    if not filled:
        return "too_short"
    aspect = math.log(width / height)
    # Rounded so that equal ratios compare equal: 832/480 and 1664/960 differ in the last bit of their logarithms.
    distances = [round(abs(math.log(w / h) - aspect), 9) for w, h in sizes]
    near = [i for i, distance in enumerate(distances) if distance <= min(distances) + ASPECT_TOLERANCE]
    fitting = [i for i in near if sizes[i][0] <= width and sizes[i][1] <= height]
    if fitting:
        size = min(fitting, key=lambda i: (-sizes[i][0] * sizes[i][1], distances[i], i))
    elif allow_upscale:
        size = min(near, key=lambda i: (sizes[i][0] * sizes[i][1], distances[i], i))
    else:
        return "too_small"
    return size * len(num_frames) + num_frames.index(max(filled))


def merge_small_buckets(
    buckets: Sequence[Bucket], counts: Sequence[int], block_size: int, allow_upscale: bool
) -> list[int]:
    """Return where each bucket's clips go, B numbers, so that no bucket is left with fewer clips than a block.

    The smallest bucket is emptied first, into the bucket that its clips fill with the least loss: of no more frames,
    and no larger unless `allow_upscale`; then the nearest aspect ratio, the most frames, the largest area. A bucket
    with no such neighbour keeps its clips.

    Args:
        buckets: every training shape, B of them.
        counts: clips of each, B of them.
        block_size: clips of one optimizer step.
        allow_upscale: enlarging is permitted.
    """
    left, target = list(counts), list(range(len(buckets)))
    stuck: set[int] = set()
    while True:
        small = [b for b, n in enumerate(left) if 0 < n < block_size and b not in stuck]
        if not small:
            return target
        bucket = min(small, key=lambda b: (left[b], b))
        into = _nearest_bucket(buckets, bucket, [b for b, n in enumerate(left) if n and b != bucket], allow_upscale)
        if into is None:
            stuck.add(bucket)
            continue
        left[into] += left[bucket]
        left[bucket] = 0
        target = [into if b == bucket else b for b in target]


def _nearest_bucket(buckets: Sequence[Bucket], bucket: int, others: Sequence[int], allow_upscale: bool) -> int | None:
    shape = buckets[bucket]

    def loss(number: int) -> tuple[float, int, int, int]:
        other = buckets[number]
        distance = round(abs(math.log(other.width / other.height) - math.log(shape.width / shape.height)), 9)
        return distance, -other.num_frames, -other.width * other.height, number

    fitting = [
        b
        for b in others
        if buckets[b].num_frames <= shape.num_frames
        and (allow_upscale or (buckets[b].width <= shape.width and buckets[b].height <= shape.height))
    ]
    return min(fitting, key=loss, default=None)
