"""Encode parts of a clip again as H.264 in mp4: upright, with square pixels, cut between two frames.

One thread and fixed settings, so that the same input gives the same bytes with the same FFmpeg.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, cast

import av
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from wan_dist.data.examine import decode_strictly
from wan_dist.data.media import MediaError, Source, display_size, open_media, sample_aspect, told
from wan_dist.data.orientation import Orientation, orientation_of
from wan_dist.data.tonemap import TRANSFERS, write_table

ENCODER_OPTIONS: Final[dict[str, object]] = {"crf": "18", "preset": "veryfast", "g": "48", "bf": "0"}
"""Near transparent, fast, with a keyframe at least every 48 frames so that random windows decode little. No B-frames:
mp4 then needs an edit list, whose length FFmpeg's muxer computes from unknown durations and so cuts the last frame."""

_TURNS: Final = {
    (False, False): "cclock_flip",
    (True, False): "clock",
    (False, True): "cclock",
    (True, True): "clock_flip",
}
"""FFmpeg's `transpose` of pictures that are transposed and then mirrored along x, and along y."""


@dataclass(frozen=True)
class Segment:
    """A part of a clip: stamps of its first and last frame, in the stream's time base."""

    first_pts: int
    last_pts: int


def scaled_size(width: int, height: int, cover: tuple[int, int] | None) -> tuple[int, int]:
    """Return the even size in px of a transcoded clip.

    Scaled down, never up, so that both the shorter side and the area still reach those of `cover`: a clip of any
    aspect then fills a bucket of that area without being enlarged.

    Args:
        width: as shown, px.
        height: as shown, px.
        cover: width and height to cover, px; None keeps the size.
    """
    scale = 1.0
    if cover is not None:
        scale = min(1.0, max(min(cover) / min(width, height), math.sqrt(cover[0] * cover[1] / (width * height))))
    return max(2, math.ceil(width * scale / 2 - 1e-6) * 2), max(2, math.ceil(height * scale / 2 - 1e-6) * 2)


def transcode(
    source: Source,
    parts: Sequence[tuple[Segment, Path]],
    *,
    cover: tuple[int, int] | None = None,
    deinterlace: bool = False,
    tonemap: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Encode parts of a video into files, with exactly the frames of each part.

    Args:
        source: a video.
        parts: where each part lies and the mp4 that it becomes, in order and not overlapping.
        cover: width and height in px that the clip is scaled down to cover; None keeps the size.
        deinterlace: remove the combs of interlaced frames (bwdif).
        tonemap: bring high dynamic range to the standard one.
        tick: called after every frame, as a sign of life.
    Raises:
        MediaError: the clip is damaged inside a part, or cannot be encoded.
    """
    with ExitStack() as stack:
        current: _Output | None = None
        waiting = iter(parts)
        part = next(waiting, None)
        try:
            table = stack.enter_context(_tone_table()) if tonemap else None
            for frame in _shaped(source, cover, deinterlace, table, parts[-1][0].last_pts):
                tick()
                pts = frame.pts or 0
                while part is not None and pts > part[0].last_pts:
                    if current is not None:
                        current.finish()
                    current, part = None, next(waiting, None)
                if part is None:
                    break
                if pts < part[0].first_pts:
                    continue
                current = current or _Output(stack, part[1], frame, part[0].first_pts)
                current.add(frame)
            if current is not None:
                current.finish()
        except FFmpegError as error:
            raise MediaError("transcode_failed", f"{told(error)}; transcode it with another program") from error


class _Output:
    """One mp4 that is being written."""

    def __init__(self, stack: ExitStack, path: Path, frame: VideoFrame, first_pts: int) -> None:
        assert frame.time_base is not None
        self._container = stack.enter_context(av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}))
        self._stream = cast(VideoStream, self._container.add_stream("libx264", rate=Fraction(1 / frame.time_base)))
        context = self._stream.codec_context
        self._stream.width, self._stream.height, self._stream.pix_fmt = frame.width, frame.height, "yuv420p"
        self._stream.options = ENCODER_OPTIONS
        context.thread_count = 1
        context.time_base = frame.time_base
        context.color_range, context.colorspace = frame.color_range, frame.colorspace
        context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
        self._first_pts = first_pts

    def add(self, frame: VideoFrame) -> None:
        assert frame.pts is not None
        frame.pts -= self._first_pts
        frame.pict_type = 0  # the encoder chooses; kept types would repeat the source's keyframes
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


@contextmanager
def _tone_table() -> Iterator[Path]:
    """Yield where a table may be written."""
    with tempfile.TemporaryDirectory(prefix="wan-data-") as folder:
        yield Path(folder) / "table.cube"


def _shaped(
    source: Source, cover: tuple[int, int] | None, deinterlace: bool, table: Path | None, last_pts: int
) -> Iterator[VideoFrame]:
    """Yield frames in their new shape, with their old stamps in the old time base."""
    with open_media(source) as (_, video):
        aspect, time_base = sample_aspect(video), video.time_base
    assert time_base is not None
    graph: Graph | None = None
    for frame in decode_strictly(source):
        graph = graph or _graph(frame, time_base, aspect, cover, deinterlace, table)
        graph.push(frame)
        yield from _drained(graph, time_base)
        # Not one frame further: it may be the damaged one.
        if frame.pts is not None and frame.pts >= last_pts:
            break
    if graph is not None:
        graph.push(None)
        yield from _drained(graph, time_base)


def _graph(
    frame: VideoFrame,
    time_base: Fraction,
    aspect: Fraction,
    cover: tuple[int, int] | None,
    deinterlace: bool,
    table: Path | None,
) -> Graph:
    orientation = orientation_of(frame)
    shown = display_size(frame.width, frame.height, aspect, orientation.transposed)
    width, height = scaled_size(*shown, cover)
    stored = (height, width) if orientation.transposed else (width, height)
    alpha = any(c.is_alpha for c in frame.format.components) or frame.format.name == "pal8"
    graph = Graph()
    graph.threads = 1
    steps: list[tuple[str, str | dict[str, str]]] = []
    if deinterlace:
        steps.append(("bwdif", "mode=send_frame:deint=interlaced"))
    if alpha:  # over black: colours times opacity
        steps += [("format", "rgba"), ("premultiply", "inplace=1")]
    scale = f"{stored[0]}:{stored[1]}:flags=bicubic"
    if table is not None and frame.color_trc in TRANSFERS:
        steps += _tone_steps(frame, scale, table)
    else:
        steps += [("scale", scale)]
    steps += [*_turn(orientation), ("format", "yuv420p"), ("setsar", "1")]
    nodes: list[Any] = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    ]
    nodes += [
        graph.add(name, **arguments) if isinstance(arguments, dict) else graph.add(name, arguments or None)
        for name, arguments in steps
    ]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


def _turn(orientation: Orientation) -> list[tuple[str, str]]:
    """Return the filters that bring a stored frame upright."""
    if orientation.transposed:
        return [("transpose", _TURNS[orientation.flip_x, orientation.flip_y])]
    return [("hflip", "")] * orientation.flip_x + [("vflip", "")] * orientation.flip_y


def _tone_steps(frame: VideoFrame, scale: str, table: Path) -> list[tuple[str, str | dict[str, str]]]:
    """Return the filters that bring a frame of high dynamic range to BT.709, and write their table."""
    write_table(table, TRANSFERS[frame.color_trc])
    stored_range = "full" if frame.color_range == ColorRange.JPEG else "limited"
    return [
        ("scale", f"{scale}:in_color_matrix=bt2020:in_range={stored_range}"),
        ("format", "gbrp16le"),
        # As keywords: a path may hold what separates arguments.
        ("lut3d", {"file": str(table), "interp": "tetrahedral"}),
        ("scale", "out_color_matrix=bt709:out_range=limited"),
        ("format", "yuv420p"),
        ("setparams", "color_primaries=bt709:color_trc=bt709:colorspace=bt709:range=tv"),
    ]


def _drained(graph: Graph, time_base: Fraction) -> Iterator[VideoFrame]:
    while True:
        try:
            frame = cast(VideoFrame, graph.pull())
        except (BlockingIOError, EOFError):
            return
        assert frame.pts is not None
        # bwdif counts in half units.
        frame.pts = round(frame.pts * (frame.time_base or time_base) / time_base)
        frame.time_base = time_base
        yield frame
