"""Videos and contact sheets as files."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from wan_dist.core.errors import RequestError

_MARGIN_PX = 4
_CAPTION_PX = 14


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: float, *, quality: int = 16) -> Path:
    """Write an h264 mp4 that every browser plays; the file appears only when complete.

    Args:
        path: file to write.
        frames: [F, H, W, 3] RGB in 0..255; H and W are even.
        fps: frames per second.
        quality: constant rate factor, 0 (lossless) to 51.

    Raises:
        RequestError: odd height or width, which h264's 4:2:0 sampling cannot hold.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise RequestError(f"{path}: {width}x{height} px is odd; mp4 needs even sizes.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(quality), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        container.mux(stream.encode(None))
    temporary.replace(path)
    return path


def write_contact_sheet(
    path: Path, videos: Sequence[NDArray[np.uint8]], captions: Sequence[str], *, columns: int = 6
) -> Path:
    """Write a PNG with one row per video: its caption and `columns` frames spread evenly over its length.

    Args:
        path: file to write.
        videos: [F, H, W, 3] RGB in 0..255, all of one size.
        captions: one per video.
        columns: frames shown of each.
    """
    _, height, width, _ = videos[0].shape
    row_height = height + _CAPTION_PX + _MARGIN_PX
    sheet_size = (columns * (width + _MARGIN_PX) + _MARGIN_PX, len(videos) * row_height + _MARGIN_PX)
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, caption) in enumerate(zip(videos, captions, strict=True)):
        top = _MARGIN_PX + row * row_height
        draw.text((_MARGIN_PX, top), caption, fill="black")
        for column, index in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
            left = _MARGIN_PX + column * (width + _MARGIN_PX)
            sheet.paste(Image.fromarray(video[index]), (left, top + _CAPTION_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
