"""Colour and motion are read right from drawn, blurred and broken clips."""

import numpy as np
import pytest

from wan_dist.data.shapes import SHAPE_COLOURS, SHAPES, ShapeClip, draw_clips
from wan_dist.sample.measure import dominant_colour, motion_direction

CLIPS = draw_clips(9, 64, 64, colours=tuple(SHAPE_COLOURS), shapes=SHAPES)


def blurred(frames: np.ndarray, radius: int) -> np.ndarray:
    """Box blur over height and width, uint8."""
    result = frames.astype(np.float64)
    for axis in (1, 2):
        result = np.mean([np.roll(result, shift, axis) for shift in range(-radius, radius + 1)], axis=0)
    return result.round().astype(np.uint8)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_drawn_clip_measures_as_its_caption_says(clip: ShapeClip) -> None:
    assert dominant_colour(clip.frames) == clip.colour
    assert motion_direction(clip.frames) == clip.direction


@pytest.mark.parametrize("clip", CLIPS[::5], ids=lambda clip: clip.name)
def test_blur_noise_and_fading_do_not_change_the_answer(clip: ShapeClip) -> None:
    noise = np.random.default_rng(0).normal(0.0, 8.0, clip.frames.shape)
    faded = 0.7 * blurred(clip.frames, 4) + 20.0 + noise
    frames = np.clip(faded, 0, 255).astype(np.uint8)
    assert dominant_colour(frames) == clip.colour
    assert motion_direction(frames) == clip.direction


def test_reversed_clip_moves_the_other_way() -> None:
    clip = next(clip for clip in CLIPS if clip.direction == "left")
    assert motion_direction(clip.frames[::-1]) == "right"


def test_transposed_clip_moves_along_the_other_axis() -> None:
    clip = next(clip for clip in CLIPS if clip.direction == "left")
    assert motion_direction(clip.frames.swapaxes(1, 2)) == "up"


def test_swapped_channels_change_the_colour() -> None:
    clip = next(clip for clip in CLIPS if clip.colour == "red")
    assert dominant_colour(clip.frames[..., ::-1]) == "blue"


def test_still_shape_has_a_colour_and_no_direction() -> None:
    still = np.repeat(CLIPS[0].frames[:1], 9, axis=0)
    assert dominant_colour(still) == CLIPS[0].colour
    assert motion_direction(still) is None


def test_plain_grey_and_noise_have_neither() -> None:
    plain = np.full((5, 32, 32, 3), 90, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3)).astype(np.uint8)
    for frames in (plain, noise):
        assert dominant_colour(frames) is None
        assert motion_direction(frames) is None


def test_white_shape_has_no_colour_but_moves() -> None:
    clip = next(clip for clip in CLIPS if clip.direction == "down")
    moving = np.abs(clip.frames.astype(int) - clip.frames[0, 0, 0]).max(axis=-1, keepdims=True) > 40
    frames = np.where(moving, 235, 40).astype(np.uint8).repeat(3, axis=-1)
    assert dominant_colour(frames) is None
    assert motion_direction(frames) == "down"
