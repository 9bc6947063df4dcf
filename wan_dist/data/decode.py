"""Decode the frames of one training sample: the right ones, upright, resized and cropped to a bucket."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from av.error import FFmpegError
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.media import MediaError, Timeline, display_size, open_media, read_timeline, sample_aspect, told
from wan_dist.data.orientation import orientation_of
from wan_dist.data.timing import available_frames, choose_frames, consecutive_frames

DECODE_RULES: Final = 3
"""Counted up with every change that alters pixels, so that caches of encoded clips notice."""


@dataclass(frozen=True)
class CropWindow:
    """Where a bucket lies in a clip that was resized to cover it, px.

    Attributes:
        width: width of the whole clip after the resize.
        height: height of the whole clip after the resize.
        x: left edge of the part that is kept.
        y: top edge of the part that is kept.
    """

    width: int
    height: int
    x: int
    y: int


def crop_window(width: int, height: int, bucket: Bucket, crop_xy: tuple[float, float]) -> CropWindow:
    """Return the cover-resize and crop that bring a clip to a bucket.

    Args:
        width: display width of the clip, px.
        height: display height of the clip, px.
        bucket: the shape wanted.
        crop_xy: place of the crop in [0, 1) along each axis; 0.5 is the centre.
    """
    scale = max(bucket.width / width, bucket.height / height)
    covered = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    x = int(crop_xy[0] * (covered[0] - bucket.width + 1))
    y = int(crop_xy[1] * (covered[1] - bucket.height + 1))
    return CropWindow(covered[0], covered[1], x, y)


def decode_clip(
    source: Path | bytes,
    bucket: Bucket,
    *,
    fps: float,
    choice: float = 0.0,
    crop_xy: tuple[float, float] = (0.5, 0.5),
    allow_duplicate_frames: bool = False,
    consecutive: bool = False,
    name: str = "clip",
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Return a clip's frames in a bucket's shape, [F, H, W, 3] RGB in 0..255.

    Frames are found by their presentation stamps. Rotation, mirroring and pixel aspect ratio are applied, the clip is
    resized (bicubic, swscale) to cover the bucket and cropped, and transparency is laid over black.

    Args:
        source: the file, or its bytes.
        bucket: width and height in px, and frames.
        fps: frame rate wanted, frames per second.
        choice: place of the window in time, in [0, 1); 0 is the head of the clip, 0.5 its centre.
        crop_xy: place of the crop in [0, 1) along width and height.
        allow_duplicate_frames: repeat frames where the clip is too slow or has holes.
        consecutive: take frames that follow each other in the file, at whatever times; `fps` then does not count.
        name: how an error names the clip.
        out: [F, H, W, 3], written to and returned; None for a new array.
    Raises:
        DataError: the clip is damaged, or gives fewer frames than the bucket has.
    """
    try:
        with open_media(source) as (container, video):
            timeline = read_timeline(container, video)
        chosen = _chosen_pts(timeline, bucket.num_frames, fps, choice, allow_duplicate_frames, consecutive)
        if out is None:
            out = np.empty((bucket.num_frames, bucket.height, bucket.width, 3), np.uint8)
        # Decoding usually starts at the last keyframe before the first frame; where that seek misses, at the head.
        if not (_starts_late(timeline, chosen) and _fill(source, chosen, bucket, crop_xy, out, seek=True)):
            stamps = timeline.pts.tolist() if timeline.by_count else None
            _fill(source, chosen, bucket, crop_xy, out, seek=False, stamps=stamps)
    except (MediaError, FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be decoded: {told(error)}") from error
    return out


def frame_times(
    source: bytes,
    num_frames: int,
    fps: float,
    choice: float,
    *,
    allow_duplicate_frames: bool,
    consecutive: bool,
    name: str,
) -> list[float]:
    """Return when the frames that `decode_clip` gives are shown, seconds after the clip's first frame, increasing.

    Raises:
        DataError: as `decode_clip`.
    """
    try:
        with open_media(source) as (container, video):
            timeline = read_timeline(container, video)
        chosen = _chosen_pts(timeline, num_frames, fps, choice, allow_duplicate_frames, consecutive)
    except (MediaError, FFmpegError, OSError, ValueError) as error:
        raise DataError(f"{name}: cannot be decoded: {told(error)}") from error
    return [float((pts - timeline.pts[0]) * timeline.time_base) for pts in chosen.tolist()]


def _chosen_pts(
    timeline: Timeline, num_frames: int, fps: float, choice: float, allow_duplicate_frames: bool, consecutive: bool
) -> NDArray[np.int64]:
    stamps = timeline.stamps_s
    if consecutive and len(stamps) >= num_frames:
        return timeline.pts[consecutive_frames(len(stamps), num_frames, choice)]
    source_fps = (len(stamps) - 1) / float(stamps[-1]) if len(stamps) > 1 else 0.0
    available = available_frames(len(stamps), source_fps, fps, allow_duplicate_frames)
    if available < num_frames:
        raise MediaError("too_short", f"{available} frames at {fps:g} fps, {num_frames} wanted")
    return timeline.pts[choose_frames(stamps, num_frames, fps, choice, allow_duplicate_frames)]


def _starts_late(timeline: Timeline, chosen: NDArray[np.int64]) -> bool:
    """Whether some frames can be left undecoded: a later keyframe than the first precedes the first chosen frame."""
    return not timeline.by_count and bool((timeline.keyframe_pts <= chosen[0]).sum() > 1)


def _fill(
    source: Path | bytes,
    chosen: NDArray[np.int64],
    bucket: Bucket,
    crop_xy: tuple[float, float],
    out: NDArray[np.uint8],
    *,
    seek: bool,
    stamps: list[int] | None = None,
) -> bool:
    """Decode the frames with stamps `chosen` into `out`. False if a seek did not lead to all of them.

    Read from the head, the n-th frame has the n-th of `stamps` where they are given, and not its own.

    Raises:
        MediaError: read from the head, and a frame did not come out.
    """
    missing = set(chosen.tolist())
    resizer = _Resizer()
    shape: tuple[int, int] | None = None
    for count, (frame, aspect) in enumerate(_frames_from(source, int(chosen[0]) if seek else None)):
        if shape not in (None, (frame.width, frame.height)):
            raise MediaError("resolution_change", f"{shape} px becomes {(frame.width, frame.height)}; split the clip")
        shape = (frame.width, frame.height)
        pts = frame.pts or 0  # a still image may have none
        if stamps is not None:
            pts = stamps[count] if count < len(stamps) else -1
        if pts in missing:
            if frame.is_corrupt:
                break
            out[chosen == pts] = _fit(frame, resizer, aspect, bucket, crop_xy)
            missing.remove(pts)
        if not missing:
            return True
    if not seek:
        raise MediaError("missing_frames", f"{len(missing)} of {len(set(chosen.tolist()))} frames do not decode")
    return False


def _frames_from(source: Path | bytes, start_pts: int | None) -> Iterator[tuple[VideoFrame, Fraction]]:
    """Yield frames with their pixels' aspect ratio from the keyframe before `start_pts`, or from the head.

    Yields nothing if the seek lands elsewhere, as it can in files with a poor index: decoders show frames whose
    references are missing as if they were whole.
    """
    with open_media(source) as (container, video):
        aspect = sample_aspect(video)
        if start_pts is not None:
            container.seek(start_pts, stream=video)
        first = start_pts is not None
        for packet in container.demux(video):
            if first and (not packet.is_keyframe or packet.pts is None or packet.pts > (start_pts or 0)):
                return
            first = False
            for frame in video.decode(packet):
                yield frame, aspect


class _Resizer:
    """Bicubic resize to RGB by swscale; kept for a clip, because it computes the weights once.

    Colour goes to full resolution in the resize, and to RGB after it: in one step, swscale gives two neighbours
    the same colour, which has three times the error on real clips and costs a quarter more.
    """

    def __init__(self) -> None:
        self._to_size, self._to_rgb = VideoReformatter(), VideoReformatter()

    def resize(self, frame: VideoFrame, width: int, height: int, pixel_format: str) -> VideoFrame:
        if between := _full_colour(frame.format):
            frame = self._to_size.reformat(
                frame, width=width, height=height, format=between, interpolation=Interpolation.BICUBIC, threads=1
            )
        return self._to_rgb.reformat(
            frame, width=width, height=height, format=pixel_format, interpolation=Interpolation.BICUBIC, threads=1
        )


def _full_colour(pixel_format: VideoFormat) -> str | None:
    """Return the format with as many samples of colour as of brightness, None for one that has them."""
    if pixel_format.is_rgb or not any(c.is_chroma for c in pixel_format.components):
        return None
    alpha = any(component.is_alpha for component in pixel_format.components)
    bits = max(component.bits for component in pixel_format.components)
    return f"yuv{'a' if alpha else ''}444p{f'{bits}le' if bits > 8 else ''}"


def _fit(
    frame: VideoFrame,
    resizer: _Resizer,
    aspect: Fraction,
    bucket: Bucket,
    crop_xy: tuple[float, float],
) -> NDArray[np.uint8]:
    """Return one frame upright, resized to cover the bucket and cropped, [H, W, 3] RGB in 0..255."""
    orientation = orientation_of(frame)
    shown = display_size(frame.width, frame.height, aspect, orientation.transposed)
    window = crop_window(*shown, bucket, crop_xy)
    # The resize comes before the turn, hence in stored orientation.
    width, height = (window.height, window.width) if orientation.transposed else (window.width, window.height)
    alpha = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    resized = resizer.resize(frame, width, height, "rgba" if alpha else "rgb24")
    plane, depth = resized.planes[0], 4 if alpha else 3
    rows = np.frombuffer(cast(Any, plane), np.uint8).reshape(
        height, plane.line_size
    )  # not to_ndarray(), which would copy
    pixels = rows[:, : width * depth].reshape(height, width, depth)
    if alpha:
        pixels = (pixels[..., :3].astype(np.uint16) * pixels[..., 3:] // 255).astype(np.uint8)
    upright = orientation.apply(pixels)
    cropped = upright[window.y : window.y + bucket.height, window.x : window.x + bucket.width]
    return np.asarray(cropped, dtype=np.uint8)
