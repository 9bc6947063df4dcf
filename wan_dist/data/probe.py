"""What a clip file holds, read without decoding it whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame

from wan_dist.data.media import MediaError, Timeline, display_size, is_image, open_media, read_timeline, sample_aspect

_HDR_TRANSFERS: Final = {16: "PQ", 18: "HLG"}
"""FFmpeg's AVColorTransferCharacteristic numbers of high dynamic range. Source: ITU-T H.273, table 3."""


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
        rotation: counter-clockwise turn that the file asks for, degrees.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    duration_s: float
    max_gap_s: float
    rotation: int


@dataclass(frozen=True)
class Reject:
    """A clip that is left out.

    Attributes:
        code: reason code.
        path: the file, relative to the source folder where it lies in it.
        hint: what was found and what to do.
    """

    code: str
    path: str
    hint: str


def probe_clip(source: Path | bytes, name: str) -> ClipInfo | Reject:
    """Return what the file holds, or why it cannot be used. Never raises on a bad file.

    All packets are read (1 to 15 ms per clip) and the first frame is decoded.

    Args:
        source: the file, or its bytes.
        name: how a `Reject` names it.
    """
    try:
        with open_media(source) as (container, video):
            timeline = read_timeline(container, video)
        with open_media(source) as (container, video):
            frame = next(iter(container.decode(video)), None)
            if frame is None:
                raise MediaError("undecodable", "no frame comes out of the decoder; export it again")
            aspect = sample_aspect(video)
            still = is_image(container)
        _check_frame(frame)
        width, height = display_size(frame.width, frame.height, aspect, frame.rotation)
    except MediaError as error:
        return Reject(error.code, name, error.hint)
    except FileNotFoundError:
        return Reject("missing_file", name, "there is no such file; correct the path or remove its row")
    except OSError as error:
        # PyAV's errors are OSErrors too where FFmpeg's code is an errno.
        return Reject("unreadable", name, f"{error}; check the file and its permissions")
    except (FFmpegError, ValueError) as error:
        return Reject("undecodable", name, f"{error}; export it again")
    return _describe(width, height, frame.rotation, timeline, still)


def _check_frame(frame: VideoFrame) -> None:
    if frame.rotation % 90:
        raise MediaError("odd_rotation", f"turned by {frame.rotation} degrees; only quarter turns are known")
    if frame.is_corrupt:
        raise MediaError("undecodable", "its first frame is damaged; export it again")
    if frame.color_trc in _HDR_TRANSFERS:
        transfer = _HDR_TRANSFERS[frame.color_trc]
        raise MediaError("hdr", f"{transfer} high dynamic range; tone-map it to BT.709 first")


def _describe(width: int, height: int, rotation: int, timeline: Timeline, still: bool) -> ClipInfo:
    stamps = timeline.stamps_s
    span_s = float(stamps[-1])
    if still or len(stamps) == 1:
        return ClipInfo(width, height, 1, 0.0, 0.0, 0.0, rotation)
    fps = (len(stamps) - 1) / span_s
    return ClipInfo(width, height, len(stamps), fps, len(stamps) / fps, float(np.diff(stamps).max()), rotation)
