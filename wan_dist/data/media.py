"""Open a video or image file without trusting it, and read its time line.

Files are always handed over as open streams, never as names: FFmpeg would fetch `http:` names and expand `%d` in
image names. The container whitelist keeps out play lists, which can point to other files.
"""

import codecs
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Final

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream
from numpy.typing import NDArray

from wan_dist.data.spans import FileSpan

FORMATS: Final = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,png_pipe,jpeg_pipe,webp_pipe"
"""FFmpeg demuxers that may open a clip."""

MAX_PIXELS: Final = 40_000_000
"""Largest frame that is decoded, px: a little over 8K (7680x4320). A 17.7 kB file can ask for 600 MB otherwise."""

_FIRST_PACKETS: Final = 32
"""More than any decoder holds back before the first frame comes out."""

Source = Path | bytes | FileSpan
"""A file, its bytes, or a part of a file."""


class MediaError(Exception):
    """A file cannot be used.

    Attributes:
        code: reason code, such as `truncated`.
        hint: what was found and what the user can do.
    """

    def __init__(self, code: str, hint: str) -> None:
        super().__init__(f"{code}: {hint}")
        self.code = code
        self.hint = hint


@dataclass(frozen=True)
class Timeline:
    """When each frame of a clip is shown.

    Attributes:
        pts: [N], int64, strictly increasing presentation stamps, in units of `time_base`.
        keyframe_pts: [K], int64, stamps at which decoding can start, increasing.
        time_base: seconds per unit.
        by_count: decoded frames have stamps that are not theirs: the n-th frame that comes out has the n-th stamp.
    """

    pts: NDArray[np.int64]
    keyframe_pts: NDArray[np.int64]
    time_base: Fraction
    by_count: bool = False

    @property
    def stamps_s(self) -> NDArray[np.float64]:
        """Seconds since the first frame, [N]."""
        return (self.pts - self.pts[0]) * float(self.time_base)


@contextmanager
def open_media(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Yield the container and its video stream, single-threaded.

    Without the explicit close, PyAV holds threads and memory: 95 threads after 60 HEVC files.

    Raises:
        MediaError: not a supported container, no video in it, or a frame size out of bounds.
    """
    with _open_stream(source) as stream:
        try:
            container = av.open(_unnamed(stream), "r", options={"format_whitelist": FORMATS}, metadata_errors="replace")
        except (FFmpegError, OSError, ValueError) as error:
            raise _explain_unopened(stream, error) from error
        with container:
            video = _video_stream(container)
            context = video.codec_context
            if context is None:
                raise MediaError("unknown_codec", "FFmpeg has no decoder for it; transcode to H.264")
            if min(context.width, context.height) < 1:
                raise _explain_no_size(stream)
            if context.width * context.height > MAX_PIXELS:
                raise MediaError(
                    "bad_frame_size",
                    f"{context.width}x{context.height} px; allowed are up to {MAX_PIXELS} pixels; scale it down",
                )
            context.thread_count = 1
            context.options = {"max_pixels": str(MAX_PIXELS)}
            yield container, video


def is_image(container: InputContainer) -> bool:
    """Whether an opened file is a still image."""
    return container.format.name.endswith("_pipe")


def read_timeline(
    container: InputContainer, video: VideoStream, on_packet: Callable[[Packet], None] = lambda _: None
) -> Timeline:
    """Return the time line from the packets themselves, without decoding. The container is at its end afterwards.

    Headers are not believed: durations and frame counts in them are often wrong by a frame or more.

    Args:
        container: as opened.
        video: its video stream.
        on_packet: given every packet of a video, the empty one at its end included.
    Raises:
        MediaError: packets are missing or damaged, or stamps are missing or repeated.
    """
    if is_image(container):
        return Timeline(np.zeros(1, np.int64), np.zeros(1, np.int64), Fraction(1, 1))
    pts: list[int | None] = []
    keys: list[int | None] = []
    num_packets = num_damaged = 0
    try:
        for packet in container.demux(video):
            on_packet(packet)
            if not packet.size:
                continue
            num_packets += 1
            num_damaged += packet.is_corrupt
            # An edit list keeps packets that are decoded but never shown.
            if not packet.is_discard:
                pts.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
    except FFmpegError as error:
        raise MediaError(
            "truncated", f"reading stops after {num_packets} frames ({told(error)}); copy it again"
        ) from error
    # Matroska's index lists keyframes only, so a missing tail cannot be told from it.
    promised = 0 if "matroska" in container.format.name else len(video.index_entries)
    if num_damaged or num_packets < promised:
        whole = num_packets - num_damaged
        raise MediaError(
            "truncated", f"{whole} whole frames of {max(promised, num_packets)}; copy or download it again"
        )
    if not pts:
        raise MediaError("no_frames", "the video stream is empty; export it again")
    if any(p is None for p in pts):
        raise MediaError("no_timestamps", "frames without time stamps; remux to mp4 with new stamps")
    ordered = np.sort(np.array(pts, np.int64))
    if (np.diff(ordered) == 0).any():
        raise MediaError("repeated_timestamps", "two frames share a time stamp; transcode with a constant frame rate")
    if video.time_base is None:
        raise MediaError("no_timestamps", "the stream has no time base; remux to mp4")
    return Timeline(ordered, np.sort(np.array(keys, np.int64)), video.time_base, is_stamped_by_count(container, video))


def is_stamped_by_count(container: InputContainer, video: VideoStream) -> bool:
    """Whether the stamps of decoded frames are wrong where B-frames reorder them.

    AVI keeps none, and FFmpeg numbers the packets of these codecs in the order of the file.
    """
    return "avi" in container.format.name and video.codec_context.name in ("h264", "hevc")


def promised_timeline(
    container: InputContainer, video: VideoStream, on_packet: Callable[[Packet], None] = lambda _: None
) -> Timeline | None:
    """Return the time line that the header promises, evenly spaced, after reading packets up to the first frame.

    None where the header says too little, as Matroska's and MPEG-TS's do.

    Args:
        container: as opened.
        video: its video stream.
        on_packet: given the packets of the first frames.
    """
    count = max(len(video.index_entries), video.frames)
    if is_image(container) or not count or "matroska" in container.format.name:
        return None
    if not video.average_rate or video.time_base is None:
        return None
    for number, packet in enumerate(container.demux(video)):
        on_packet(packet)
        if number > _FIRST_PACKETS:
            break
    step = max(1, round(1 / (video.average_rate * video.time_base)))
    return Timeline(np.arange(count, dtype=np.int64) * step, np.zeros(1, np.int64), video.time_base)


def display_size(width: int, height: int, sample_aspect: Fraction, transposed: bool) -> tuple[int, int]:
    """Return width and height in px as shown: pixels made square, then turned.

    Args:
        width: stored width, px.
        height: stored height, px.
        sample_aspect: width of a stored pixel over its height.
        transposed: it is shown turned by one or three quarters, mirrored or not.
    """
    shown = max(1, round(width * sample_aspect)), height
    return (shown[1], shown[0]) if transposed else shown


def sample_aspect(video: VideoStream) -> Fraction:
    """Return the stored pixel's width over its height; 1 where the file does not say."""
    return video.sample_aspect_ratio or Fraction(1)


def _video_stream(container: InputContainer) -> VideoStream:
    """The default video stream, else the largest; a cover picture is none."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise MediaError("no_video", "there is no video stream in it (sound or cover art only); remove it")
    default = [s for s in videos if s.disposition & Disposition.default]
    return max(default or videos, key=_area)


def _area(video: VideoStream) -> int:
    # A stream whose header is broken has no codec context, although PyAV's stubs promise one.
    return video.codec_context.width * video.codec_context.height if video.codec_context else 0


def _open_stream(source: Source) -> IO[bytes]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return source.open() if isinstance(source, FileSpan) else source.open("rb")


def _unnamed(stream: IO[bytes]) -> SimpleNamespace:
    """Hide a file's name, which PyAV would pass on and FFmpeg would guess the format from."""
    return SimpleNamespace(read=stream.read, seek=stream.seek, tell=stream.tell, seekable=stream.seekable)


def _explain_unopened(stream: IO[bytes], error: Exception) -> MediaError:
    """Tell apart the usual reasons for which FFmpeg opens nothing."""
    stream.seek(0)
    head = stream.read(512).lstrip().lower()
    if not head:
        return MediaError("empty_file", "0 bytes; download it again")
    if head.startswith((b"#extm3u", b"ffconcat")):
        return MediaError("unknown_container", "a play list, which only points to clips; give the clips themselves")
    if _is_text(head):
        return MediaError("not_media", "a web page or text saved under a video's name; download it again")
    if head[4:8] == b"ftyp":
        return MediaError("truncated", "an mp4 without its index (moov), cut off early; download it again")
    return MediaError("unknown_container", f"not {FORMATS} ({told(error)}); transcode to mp4")


def _explain_no_size(stream: IO[bytes]) -> MediaError:
    """Tell an animated WebP, of which FFmpeg reads no frame, from a broken header."""
    stream.seek(0)
    head = stream.read(32)
    if head[8:16] == b"WEBPVP8X" and head[20:21] and head[20] & 0x02:
        return MediaError("unknown_codec", "an animated WebP, which FFmpeg cannot decode; transcode to mp4")
    return MediaError("bad_frame_size", "its header has no frame size; export it again")


def _is_text(head: bytes) -> bool:
    """Whether a file begins like text: no video begins with this many bytes that can be printed."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def told(error: Exception) -> str:
    """Return what an error says, without numbers and names that mean nothing to a user."""
    return (error.strerror if isinstance(error, OSError | FFmpegError) else None) or str(error)
