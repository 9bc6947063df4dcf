"""Captioned synthetic clips: one coloured shape that moves in one named direction.

They stand in for a data set where none is at hand: the quickstart, tests and the tiny VAE are made from them.
Big plain shapes on purpose, so that a model of a few hundred thousand parameters learns them in minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 40),
    "green": (45, 190, 60),
    "blue": (55, 85, 230),
    "yellow": (230, 210, 45),
    "magenta": (205, 55, 205),
    "cyan": (45, 200, 215),
}
"""RGB in 0..255 of each named colour. Kept off 0 and 255, where the VAE's output clamp has no gradient."""

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit motion (x, y) of each named direction in image axes, y pointing down."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")

BACKGROUND: tuple[int, int, int] = (48, 48, 52)
"""RGB of the plain background of `draw_clips`, in 0..255."""

_DIRECTION_WORDS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


@dataclass(frozen=True)
class ShapeClip:
    """One drawn clip and what its caption says.

    Attributes:
        name: unique key, letters, digits and "_" only.
        caption: for example "a red circle moves to the left".
        frames: [F, H, W, 3], uint8 RGB.
        colour: key of SHAPE_COLOURS.
        shape: member of SHAPES.
        direction: key of DIRECTIONS.
    """

    name: str
    caption: str
    frames: np.ndarray
    colour: str
    shape: str
    direction: str


def shape_caption(colour: str, shape: str, direction: str) -> str:
    """Return the caption of one clip, such as "a blue square moves up"."""
    return f"a {colour} {shape} moves {_DIRECTION_WORDS[direction]}"


def draw_clips(
    num_frames: int,
    height: int,
    width: int,
    *,
    colours: Sequence[str] = ("red", "green", "blue", "yellow"),
    shapes: Sequence[str] = ("circle", "square"),
) -> list[ShapeClip]:
    """Return one clip for each shape, direction and colour, always the same ones in the same order.

    The defaults give 32 clips. Colours change fastest and directions are rotated along, so that any run
    of eight neighbours holds every default colour and direction.

    Args:
        num_frames: frames of each clip.
        height: frame height in pixels.
        width: frame width in pixels.
        colours: keys of SHAPE_COLOURS.
        shapes: members of SHAPES.
    """
    directions = list(DIRECTIONS)
    clips = []
    for shape in shapes:
        for turn in range(len(directions)):
            for index, colour in enumerate(colours):
                direction = directions[(turn + index) % len(directions)]
                clips.append(_draw_clip(colour, shape, direction, num_frames, height, width))
    return clips


def draw_random_clip(rng: np.random.Generator, num_frames: int, height: int, width: int) -> np.ndarray:
    """Return one varied clip, [F, H, W, 3] uint8 RGB, for training an autoencoder.

    Sizes, positions, speeds, colours, backgrounds, textures and the number of shapes (one to three) are random,
    so that what is trained on it does not only know the clips of `draw_clips`.

    Args:
        rng: source of every random choice.
        num_frames: frames of the clip.
        height: frame height in pixels.
        width: frame width in pixels.
    """
    frames = np.broadcast_to(_random_background(rng, height, width), (num_frames, height, width, 3)).copy()
    span = min(height, width)
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        radius = span * rng.uniform(0.08, 0.26)
        centre = rng.uniform(0.1, 0.9, 2) * (width, height)
        velocity = rng.normal(0.0, 0.05, 2) * span
        velocity *= rng.choice([[1, 0], [0, 1], [1, 1], [1, 0], [0, 1]])
        path = centre + velocity * np.arange(num_frames)[:, None]
        colour = _random_colour(rng)
        if rng.random() < 0.25:  # a shape may carry a gradient of its own
            colour = colour + (_random_colour(rng) - colour) * np.linspace(0, 1, height)[:, None, None]
        _paint(frames, str(rng.choice(SHAPES)), path, radius, colour)
    if rng.random() < 0.1:
        frames = frames + rng.normal(0.0, rng.uniform(1.0, 3.0), frames.shape)
    return _to_uint8(frames)


def _draw_clip(colour: str, shape: str, direction: str, num_frames: int, height: int, width: int) -> ShapeClip:
    """Return one clip whose shape, a third of the frame wide, crosses the middle of the frame."""
    progress = np.linspace(-0.5, 0.5, num_frames)[:, None] if num_frames > 1 else np.zeros((1, 1))
    travel = np.array(DIRECTIONS[direction]) * (0.46 * width, 0.46 * height)
    path = np.array([width / 2, height / 2]) + travel * progress
    frames = np.full((num_frames, height, width, 3), BACKGROUND, dtype=np.float64)
    _paint(frames, shape, path, 0.18 * min(height, width), np.array(SHAPE_COLOURS[colour], dtype=np.float64))
    return ShapeClip(
        name=f"{colour}_{shape}_{direction}",
        caption=shape_caption(colour, shape, direction),
        frames=_to_uint8(frames),
        colour=colour,
        shape=shape,
        direction=direction,
    )


def _paint(frames: np.ndarray, shape: str, path: np.ndarray, radius: float, colour: np.ndarray) -> None:
    """Draw one anti-aliased shape over every frame, in place.

    Args:
        frames: [F, H, W, 3], float RGB in 0..255.
        shape: member of SHAPES.
        path: [F, 2], centre (x, y) in pixels per frame.
        radius: half the shape's width in pixels.
        colour: RGB in 0..255, [3] or anything that broadcasts to [H, W, 3].
    """
    height, width = frames.shape[1:3]
    x = np.arange(width)[None, None, :] + 0.5 - path[:, 0, None, None]
    y = np.arange(height)[None, :, None] + 0.5 - path[:, 1, None, None]
    coverage = np.clip(0.5 - _signed_distance(shape, x, y, radius), 0.0, 1.0)[..., None]
    frames += coverage * (colour - frames)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return pixels outside (positive) or inside (negative) the shape's edge, for offsets from its centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        side = 0.9 * radius
        return np.maximum(np.abs(x), np.abs(y)) - side
    if shape == "triangle":  # apex up; the two slanted edges have the slope 2:1
        slant = (2.0 * np.abs(x) - y) / np.sqrt(5.0) - radius / np.sqrt(5.0)
        return np.maximum(slant, y - radius)
    raise ValueError(f"shape {shape!r} is not one of {SHAPES}")


def _random_colour(rng: np.random.Generator) -> np.ndarray:
    """Return RGB in 0..255, [3]: half the time one of SHAPE_COLOURS with jitter, else anything."""
    if rng.random() < 0.6:
        named = list(SHAPE_COLOURS.values())
        return np.clip(np.array(named[rng.integers(len(named))]) + rng.normal(0.0, 10.0, 3), 12, 243)
    return rng.uniform(12, 243, 3)


def _random_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a background, [H, W, 3] float RGB: plain, a gradient, or smooth blotches."""
    kind = rng.random()
    if kind < 0.5:
        return np.broadcast_to(np.array(BACKGROUND) + rng.normal(0.0, 4.0, 3), (height, width, 3))
    base = rng.uniform(15, 130, 3) if rng.random() < 0.7 else _random_colour(rng)
    if kind < 0.75:
        return np.broadcast_to(base, (height, width, 3))
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    if kind < 0.9:
        angle = rng.uniform(0, 2 * np.pi)
        ramp = (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    else:
        frequency, phase = rng.uniform(3, 12, 2), rng.uniform(0, 2 * np.pi, 2)
        ramp = (0.5 + 0.25 * (np.sin(frequency[0] * x + phase[0]) + np.sin(frequency[1] * y + phase[1])))[..., None]
    return base + ramp * rng.uniform(-60, 60, 3)


def _to_uint8(frames: np.ndarray) -> np.ndarray:
    """Return frames rounded to uint8."""
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)
