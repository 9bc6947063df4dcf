"""Draw clips whose frames carry their own number, so that a test sees which frame it was given."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

BITS = 8
"""Columns of the barcode: one bit each, the lowest at the left, then a white and a black one that fix the direction."""

REAL_CLIPS = Path(__file__).parents[2] / "shared" / "clips"


def draw_frame(number: int, width: int, height: int) -> NDArray[np.uint8]:
    """Return a frame with the barcode of `number` in black and white columns, [height, width, 3]."""
    bits = [(number >> bit) & 1 for bit in range(BITS)] + [1, 0]
    columns = np.array(bits, np.uint8)[np.arange(width) * len(bits) // width] * 200 + 20
    return np.broadcast_to(columns[None, :, None], (height, width, 3)).copy()


def read_number(frame: NDArray[np.uint8]) -> int:
    """Return the number in a frame's barcode, -1 if there is none."""
    _, width, _ = frame.shape
    centres = ((np.arange(BITS + 2) + 0.5) * width / (BITS + 2)).astype(int)
    bits = frame.mean(axis=(0, 2))[centres] > 120
    if list(bits[BITS:]) != [True, False]:
        return -1
    return int((bits[:BITS] << np.arange(BITS)).sum())


def read_numbers(frames: NDArray[np.uint8]) -> list[int]:
    """Return the number in each frame of [F, H, W, 3]."""
    return [read_number(frame) for frame in frames]


def write_clip(
    path: Path,
    num_frames: int,
    *,
    fps: int = 24,
    size: tuple[int, int] = (160, 96),
    stamps_ms: Sequence[int] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rotation: int | None = None,
    sample_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    first: int = 0,
) -> Path:
    """Write a clip whose frame i shows the barcode of `first + i`; return `path`.

    `stamps_ms` gives each frame its time in milliseconds (a variable frame rate); `options` are the encoder's.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=fps))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        # Two B-frames and a short group of pictures: presentation order differs from file order, and seeks matter.
        stream.options = {**(options if options is not None else {"g": "12", "bf": "2", "preset": "ultrafast"})}
        if stamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sample_aspect is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw_frame(first + number, *size), "rgb24")
            frame.time_base = Fraction(1, fps) if stamps_ms is None else Fraction(1, 1000)
            frame.pts = number if stamps_ms is None else stamps_ms[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound_only(path: Path) -> Path:
    """Write an mp4 without any video stream; return `path`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
