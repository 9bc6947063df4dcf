"""Which bucket a clip goes to."""

import pytest

from wan_dist.core.buckets import REASONS, assign_bucket, make_buckets, merge_small_buckets

SIZES = [(832, 480), (480, 832), (640, 640)]
FRAMES = [1, 49, 81]


def assign(width: int, height: int, frames: int, *, upscale: bool = False) -> tuple[int, int, int] | str:
    found = assign_bucket(width, height, frames, SIZES, FRAMES, upscale)
    if isinstance(found, str):
        return found
    bucket = make_buckets(SIZES, FRAMES)[found]
    return bucket.width, bucket.height, bucket.num_frames


@pytest.mark.parametrize(
    ("width", "height", "frames", "expected"),
    [
        (1920, 1080, 200, (832, 480, 81)),
        (1080, 1920, 81, (480, 832, 81)),
        (1000, 1000, 80, (640, 640, 49)),
        (832, 480, 48, (832, 480, 1)),
        (4000, 3000, 1, (640, 640, 1)),
    ],
)
def test_nearest_aspect_and_longest_filled_length(
    width: int, height: int, frames: int, expected: tuple[int, int, int]
) -> None:
    assert assign(width, height, frames) == expected


def test_small_clips_are_refused_unless_upscaling_is_allowed() -> None:
    assert assign(831, 480, 81) == "too_small"
    assert assign(831, 480, 81, upscale=True) == (832, 480, 81)
    # Never cropped to another orientation only because that one is small enough.
    assert assign_bucket(800, 450, 81, [(1280, 720), (320, 320)], [81], False) == "too_small"


def test_images_need_a_one_frame_bucket() -> None:
    assert assign_bucket(832, 480, 1, SIZES, [49], False) == "too_short"
    assert assign_bucket(832, 480, 1, SIZES, [49, 1], False) == 1


def test_largest_of_equal_aspects_that_fits() -> None:
    sizes = [(416, 240), (832, 480), (1664, 960)]
    assert assign_bucket(1280, 720, 5, sizes, [5], False) == 1
    assert assign_bucket(100, 60, 5, sizes, [5], True) == 0


def test_every_reason_has_advice() -> None:
    assert {"too_short", "too_small"} == set(REASONS)


def merged(counts: list[int], block_size: int = 8, *, upscale: bool = False) -> list[int]:
    return merge_small_buckets(make_buckets(SIZES, FRAMES), counts, block_size, upscale)


def test_small_buckets_merge_into_the_nearest_shape_their_clips_fill() -> None:
    # Buckets: 832x480, 480x832, 640x640, each with 1, 49 and 81 frames.
    assert merged([9, 9, 9, 9, 9, 9, 9, 9, 9]) == list(range(9))
    # Fewer frames of the same size; nothing smaller than the 1-frame bucket, which keeps its clips.
    assert merged([3, 20, 5, 0, 0, 0, 0, 0, 0]) == [0, 1, 1, 3, 4, 5, 6, 7, 8]
    # Two small ones together fill a block, and then stay.
    assert merged([0, 5, 5, 0, 0, 0, 0, 0, 0])[1:3] == [1, 1]
    # Another aspect ratio would need enlarging.
    assert merged([0, 20, 0, 0, 5, 0, 0, 0, 0])[4] == 4
    assert merged([0, 20, 0, 0, 5, 0, 0, 0, 0], upscale=True)[4] == 1
