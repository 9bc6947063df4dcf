"""The synthetic clips are distinct, repeatable and say what they show."""

import numpy as np
import pytest

from wan_dist.data.shapes import BACKGROUND, SHAPE_COLOURS, SHAPES, draw_clips, draw_random_clip


def test_default_clips_are_many_distinct_and_repeatable() -> None:
    first, second = draw_clips(5, 32, 48), draw_clips(5, 32, 48)
    assert len(first) == 32
    assert len({clip.name for clip in first}) == len({clip.caption for clip in first}) == 32
    assert len({clip.frames.tobytes() for clip in first}) == 32
    for one, other in zip(first, second, strict=True):
        assert one.frames.shape == (5, 32, 48, 3)
        assert one.frames.dtype == np.uint8
        assert (one.caption, one.frames.tobytes()) == (other.caption, other.frames.tobytes())


def test_any_eight_neighbours_hold_every_colour_and_direction() -> None:
    clips = draw_clips(1, 32, 32)
    for start in range(0, len(clips), 8):
        window = clips[start : start + 8]
        assert {clip.colour for clip in window} == {"red", "green", "blue", "yellow"}
        assert {clip.direction for clip in window} == {"left", "right", "up", "down"}


def test_shape_is_drawn_in_its_colour_on_the_background() -> None:
    for clip in draw_clips(5, 64, 64, colours=tuple(SHAPE_COLOURS), shapes=SHAPES):
        assert tuple(clip.frames[2, 32, 32]) == SHAPE_COLOURS[clip.colour]
        assert tuple(clip.frames[2, 0, 0]) == BACKGROUND
        assert clip.caption.startswith(f"a {clip.colour} {clip.shape} moves ")


def test_random_clips_differ_and_follow_the_seed() -> None:
    clips = [draw_random_clip(np.random.default_rng(seed), 5, 32, 48) for seed in (1, 2, 1)]
    assert clips[0].shape == (5, 32, 48, 3)
    assert clips[0].dtype == np.uint8
    assert clips[0].tobytes() == clips[2].tobytes() != clips[1].tobytes()


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="hexagon"):
        draw_clips(5, 32, 32, shapes=("hexagon",))
