"""What a clip file holds, read without decoding it whole."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from av import time_base as AV_TIME_BASE
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from wan_dist.data.media import (
    MediaError,
    Source,
    Timeline,
    display_size,
    is_image,
    open_media,
    promised_timeline,
    read_timeline,
    sample_aspect,
    told,
)
from wan_dist.data.orientation import orientation_of
from wan_dist.data.tonemap import TRANSFERS

MIN_SIDE_PX: Final = 16
MAX_ASPECT: Final = 16
"""Shown sizes outside these are mistakes of the file, not clips: no bucket comes near them."""

WARNINGS: Final[dict[str, str]] = {
    "interlaced": "interlaced, so that moving edges show combs; --deinterlace removes them",
    "alpha": "has transparency, which is laid over black",
    "missing_tail": "ends before the length in its header; if it was cut off, copy it again",
    "several_videos": "holds several video streams; the default one is taken, else the largest",
    "time_gap": "has a hole in its time line; a training frame rate that falls into it leaves the clip out",
    "static": "nothing moves in it; --drop-static leaves such clips out",
    "black": "it is black; --drop-black leaves such clips out",
    "tone_mapped": "high dynamic range, mapped to BT.709; look at it with `wan-data preview`",
    "salvaged": "only the whole frames before its damage were kept",
    "long_caption": "its caption is cut at 512 tokens in training; shorten it",
    "same_content": "another clip has the same bytes; --drop-duplicates keeps only the first",
}
"""What is said about clips that are packed all the same."""

_MISSING_TAIL_S: Final = 0.5
_TIME_GAP_S: Final = 0.5


@dataclass(frozen=True)
class ClipInfo:
    """What the index says about a clip.

    Attributes:
        width: as shown, px: after rotation and with square pixels.
        height: as shown, px.
        num_frames: frames that are really in the file.
        fps: mean frame rate from the stamps, frames per second; 0 for an image.
        duration_s: seconds, the last frame shown as long as the mean frame; 0 for an image.
        max_gap_s: longest time between two frames, seconds; 0 for an image.
        rotation: counter-clockwise turn that the file asks for, degrees; a mirroring is not in it.
        warnings: keys of `WARNINGS`.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    max_gap_s: float
    rotation: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reject:
    """A clip that is left out, or that is packed with a warning.

    Attributes:
        code: reason code.
        path: the file, relative to the source folder where it lies in it.
        hint: what was found and what to do.
    """

    code: str
    path: str
    hint: str


def probe_clip(source: Source, name: str, *, allow_hdr: bool = False, trust_header: bool = False) -> ClipInfo | Reject:
    """Return what the file holds, or why it cannot be used. Never raises on a bad file.

    All packets are read (1 to 15 ms per clip) and the first frame is decoded.

    Args:
        source: the file, or its bytes.
        name: how a `Reject` names it.
        allow_hdr: return a video of high dynamic range with the warning `tone_mapped` instead of rejecting it.
        trust_header: read no further than the first frame where the header says how many there are, and how fast.
    """
    try:
        with open_media(source) as (container, video):
            first = _FirstFrame(video)
            timeline = promised_timeline(container, video, first.look) if trust_header else None
            timeline = timeline or read_timeline(container, video, first.look)
            warnings = _stream_warnings(container, timeline)
            aspect = sample_aspect(video)
            still, codec = is_image(container), video.codec_context.name
            frame = next(iter(container.decode(video)), None) if still else first.get()
        if frame is None:
            raise MediaError("undecodable", "no frame comes out of the decoder; export it again")
        hdr = _check_frame(frame, allow_hdr and not still)
        width, height = display_size(frame.width, frame.height, aspect, orientation_of(frame).transposed)
        _check_size(width, height)
        warnings += _frame_warnings(frame, codec) + (("tone_mapped",) if hdr else ())
    except MediaError as error:
        return Reject(error.code, name, error.hint)
    except FileNotFoundError:
        return Reject("missing_file", name, "there is no such file; correct the path or remove its row")
    except OSError as error:
        # PyAV's errors are OSErrors too where FFmpeg's code is an errno.
        return Reject("unreadable", name, f"{told(error)}; check the file and its permissions")
    except (FFmpegError, ValueError) as error:
        return Reject("undecodable", name, f"{told(error)}; export it again")
    return _describe(width, height, frame.rotation, timeline, still, warnings)


class _FirstFrame:
    """Decodes packets until a frame comes out, while they are read for the time line: opening costs the most."""

    def __init__(self, video: VideoStream) -> None:
        self._video = video
        self._frame: VideoFrame | None = None
        self._error: FFmpegError | None = None

    def look(self, packet: Packet) -> None:
        if self._frame is None and self._error is None:
            try:
                self._frame = next(iter(self._video.decode(packet)), None)
            except FFmpegError as error:
                # Kept for later: that the file is cut off says more.
                self._error = error

    def get(self) -> VideoFrame | None:
        if self._error is not None:
            raise self._error
        return self._frame


def _check_frame(frame: VideoFrame, allow_hdr: bool) -> bool:
    """Return whether the frame has high dynamic range."""
    if frame.is_corrupt:
        raise MediaError("undecodable", "its first frame is damaged; export it again")
    if frame.color_trc in TRANSFERS and not allow_hdr:
        raise MediaError("hdr", f"{TRANSFERS[frame.color_trc]} high dynamic range; pack with --tonemap")
    return frame.color_trc in TRANSFERS


def _check_size(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE_PX or max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(
            "bad_frame_size",
            f"{width}x{height} px as shown; sides from {MIN_SIDE_PX} px and up to {MAX_ASPECT}:1 are allowed; crop it",
        )


def _stream_warnings(container: InputContainer, timeline: Timeline) -> tuple[str, ...]:
    warnings: tuple[str, ...] = ()
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if len(videos) > 1:
        warnings += ("several_videos",)
    # Matroska says its length at its head and has no list of frames that a cut could be told from.
    if "matroska" in container.format.name and container.duration:
        # Some programs count that length from the first frame, others (FFmpeg) from 0.
        end_s = float(timeline.pts[-1] * timeline.time_base) - min(0, container.start_time or 0) / AV_TIME_BASE
        if container.duration / AV_TIME_BASE - end_s > _MISSING_TAIL_S:
            warnings += ("missing_tail",)
    return warnings


def _frame_warnings(frame: VideoFrame, codec: str) -> tuple[str, ...]:
    interlaced = ("interlaced",) if frame.interlaced_frame else ()
    # JPEG has none: FFmpeg's alpha of a CMYK picture is opaque.
    alpha = codec != "mjpeg" and any(c.is_alpha for c in frame.format.components)
    return interlaced + (("alpha",) if alpha else ())


def _describe(
    width: int, height: int, rotation: int, timeline: Timeline, still: bool, warnings: tuple[str, ...]
) -> ClipInfo:
    stamps = timeline.stamps_s
    span_s = float(stamps[-1])
    if still or len(stamps) == 1:
        return ClipInfo(width, height, 1, 0.0, 0.0, 0.0, rotation, warnings)
    fps = (len(stamps) - 1) / span_s
    max_gap_s = float(np.diff(stamps).max())
    if max_gap_s > max(_TIME_GAP_S, 2 / fps):
        warnings += ("time_gap",)
    return ClipInfo(width, height, len(stamps), fps, len(stamps) / fps, max_gap_s, rotation, warnings)
