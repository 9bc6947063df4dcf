"""Frames of clips side by side, each with its time."""

import textwrap
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_TILE_WIDTH: Final = 160
_TILES_PER_ROW: Final = 9
_LINE_PX: Final = 14
_MARGIN_PX: Final = 4
_CHARACTERS_PER_LINE: Final = 220


def contact_sheet(clips: Sequence[tuple[str, NDArray[np.uint8], Sequence[float]]]) -> Image.Image:
    """Return one picture of clips: a title each, and all frames with their times below.

    Args:
        clips: title, frames [F, H, W, 3] RGB in 0..255, and the time of each frame in seconds.
    """
    strips = [_strip(*clip) for clip in clips]
    sheet = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(title: str, frames: NDArray[np.uint8], times_s: Sequence[float]) -> Image.Image:
    _, height, width, _ = frames.shape
    tile = _TILE_WIDTH, max(1, round(_TILE_WIDTH * height / width))
    lines = textwrap.wrap(title, _CHARACTERS_PER_LINE)
    head_px = len(lines) * _LINE_PX + 2 * _MARGIN_PX
    cell = tile[0] + _MARGIN_PX, tile[1] + _LINE_PX + _MARGIN_PX
    rows = -(-len(frames) // _TILES_PER_ROW)
    strip = Image.new("RGB", (cell[0] * _TILES_PER_ROW, head_px + rows * cell[1]), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((_MARGIN_PX, _MARGIN_PX), "\n".join(lines), fill="black")
    for number, (frame, time_s) in enumerate(zip(frames, times_s, strict=True)):
        left, top = number % _TILES_PER_ROW * cell[0], head_px + number // _TILES_PER_ROW * cell[1]
        strip.paste(Image.fromarray(frame).resize(tile), (left, top))
        draw.text((left, top + tile[1]), f"{number}: {time_s:.3f} s", fill="black")
    return strip
