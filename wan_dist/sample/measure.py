"""Reads the colour and the motion of one shape off a video, to check what a model drew."""

import numpy as np

from wan_dist.data.shapes import DIRECTIONS, SHAPE_COLOURS

MIN_CONTRAST = 40.0
"""RGB distance (0..441) from the background below which nothing counts as foreground."""

MIN_CHROMA = 25.0
"""RGB distance from grey below which a pixel has no hue to vote with."""

MIN_TRAVEL = 0.06
"""Share of the frame's size below which a shape counts as still."""


def dominant_colour(frames: np.ndarray) -> str | None:
    """Return the key of SHAPE_COLOURS that most of the foreground has, or None where there is no clear one.

    Each foreground pixel votes for the named colour of the nearest hue, so that blur and fading, which change
    lightness and saturation, hardly matter. The winner needs more than half of all votes.

    Args:
        frames: [F, H, W, 3], uint8 RGB.
    """
    pixels = frames[_foreground(frames)].astype(np.float64)
    names = list(SHAPE_COLOURS)
    named_hues, _ = _hue(np.array([SHAPE_COLOURS[name] for name in names], dtype=np.float64))
    hues, chroma = _hue(pixels)
    hues = hues[chroma > MIN_CHROMA]
    if len(hues) == 0 or len(hues) <= 0.5 * len(pixels):
        return None
    votes = np.bincount(np.argmax(hues @ named_hues.T, axis=1), minlength=len(names))
    winner = int(votes.argmax())
    return names[winner] if votes[winner] > 0.5 * len(pixels) else None


def motion_direction(frames: np.ndarray) -> str | None:
    """Return the key of DIRECTIONS that the foreground moves in, or None where it rests, slants or is absent.

    A line is fitted through the foreground's centre over the frames, so that a single odd frame does not decide.

    Args:
        frames: [F, H, W, 3], uint8 RGB.
    """
    mask = _foreground(frames)
    num_frames, height, width = mask.shape
    seen = np.flatnonzero(mask.any(axis=(1, 2)))
    if len(seen) < max(2, num_frames / 2):
        return None
    area = mask[seen].sum(axis=(1, 2))
    x = (mask[seen].sum(axis=1) @ np.arange(width)) / area
    y = (mask[seen].sum(axis=2) @ np.arange(height)) / area
    travel = np.array([np.polyfit(seen, x, 1)[0] / width, np.polyfit(seen, y, 1)[0] / height]) * (num_frames - 1)
    along, across = np.sort(np.abs(travel))[::-1]
    if along < MIN_TRAVEL or along < 1.5 * across:
        return None
    return max(DIRECTIONS, key=lambda name: float(travel @ np.array(DIRECTIONS[name])))


def _foreground(frames: np.ndarray) -> np.ndarray:
    """Return where a video differs clearly from its background, [F, H, W] bool.

    The background is the median colour of all pixels; a pixel is foreground from half the contrast of the
    most different pixels on. Without any contrast nothing is foreground.
    """
    pixels = frames.astype(np.float64)
    distance = np.linalg.norm(pixels - np.median(pixels, axis=(0, 1, 2)), axis=-1)
    contrast = np.percentile(distance, 99.0)
    return distance > max(0.5 * contrast, MIN_CONTRAST)


def _hue(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors [N, 3] of hue, which is RGB less its grey part, and chroma [N], the length of that."""
    off_grey = colours - colours.mean(axis=-1, keepdims=True)
    chroma = np.linalg.norm(off_grey, axis=-1)
    return off_grey / np.maximum(chroma, 1e-6)[:, None], chroma
