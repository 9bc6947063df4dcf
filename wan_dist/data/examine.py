"""Look at every frame of a clip: does it decode, where do scenes change, does anything move, is it black."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

from wan_dist.core.errors import ConfigError
from wan_dist.data.media import MediaError, Source, is_stamped_by_count, open_media, read_timeline, told

STATIC_LEVELS: Final = 4
"""A clip is static if no pixel of its thumbnails ever differs from the first by more, in levels of 255."""

BLACK_LEVELS: Final = 24
"""A clip is black if no pixel of its thumbnails is ever brighter, in levels of 255."""

_THUMB_SIZE: Final = (32, 18)
_SCENE_SIZE: Final = (160, 90)


@dataclass(frozen=True)
class Examination:
    """What came out of the decoder.

    Attributes:
        pts: [N], int64, stamps of the frames that decode without damage, up to the first damage.
        time_base: seconds per unit of `pts`.
        thumbs: [N, 18, 32], uint8 gray.
        cuts: frames that start a new scene, increasing.
        problem: the first damage, None if all is well.
    """

    pts: NDArray[np.int64]
    time_base: Fraction
    thumbs: NDArray[np.uint8]
    cuts: tuple[int, ...]
    problem: MediaError | None


def examine(source: Source, *, find_scenes: bool, tick: Callable[[], None] = lambda: None) -> Examination:
    """Decode a clip whole and report on it. Damage does not raise, it ends the report.

    Args:
        source: a video that `open_media` opens.
        find_scenes: look for scene changes.
        tick: called after every frame, as a sign of life.
    Raises:
        ConfigError: `find_scenes` without PySceneDetect.
        MediaError: the file does not open.
    """
    scenes = SceneFinder() if find_scenes else None
    pts: list[int] = []
    thumbs: list[NDArray[np.uint8]] = []
    problem: MediaError | None = None
    time_base = Fraction(1)
    try:
        for frame in decode_strictly(source):
            assert frame.pts is not None
            time_base = frame.time_base or time_base
            if scenes:
                scenes.add(frame)
            pts.append(frame.pts)
            thumbs.append(_small(frame, _THUMB_SIZE, "gray"))
            tick()
        problem = _missing(source, len(pts))
    except MediaError as error:
        if not pts:
            raise
        problem = error
    pictures = np.stack(thumbs) if thumbs else np.zeros((0, _THUMB_SIZE[1], _THUMB_SIZE[0]), np.uint8)
    return Examination(np.array(pts, np.int64), time_base, pictures, scenes.cuts() if scenes else (), problem)


def decode_strictly(source: Source) -> Iterator[VideoFrame]:
    """Yield the frames of a clip in order of presentation; stop at the first that is damaged.

    Raises:
        MediaError: code `corrupt`, `resolution_change` or `repeated_timestamps`, after the last good frame.
    """
    count = 0
    shape: tuple[int, int] | None = None
    last: int | None = None
    with open_media(source) as (container, video):
        # Those of decoded frames are then wrong. Another opening, since reading them ends this one.
        stamps = _all_stamps(source) if is_stamped_by_count(container, video) else None
        # Without it the decoder paints over the damage and says nothing.
        video.codec_context.options = {**video.codec_context.options, "err_detect": "explode"}
        frames = container.decode(video)
        while True:
            try:
                frame = next(frames, None)
            except FFmpegError as error:
                raise MediaError(
                    "corrupt", f"damaged after frame {count} ({told(error)}); use --salvage, or replace it"
                ) from error
            if frame is None:
                return
            if frame.is_corrupt:
                raise MediaError("corrupt", f"frame {count} is damaged; use --salvage, or replace it")
            if shape not in (None, (frame.width, frame.height)):
                raise MediaError(
                    "resolution_change",
                    f"{shape} px becomes {(frame.width, frame.height)} at frame {count}; split it, or use --salvage",
                )
            shape = frame.width, frame.height
            if stamps is not None:
                frame.pts = stamps[count] if count < len(stamps) else None
            if frame.pts is None:
                raise MediaError("no_timestamps", "frames without time stamps; remux to mp4 with new stamps")
            if last is not None and frame.pts <= last:
                raise MediaError("repeated_timestamps", f"frame {count} is not after the frame before; transcode it")
            last = frame.pts
            count += 1
            yield frame


def _all_stamps(source: Source) -> list[int]:
    with open_media(source) as (container, video):
        return read_timeline(container, video).pts.tolist()


def is_static(thumbs: NDArray[np.uint8]) -> bool:
    """Whether nothing moves in a clip, from its thumbnails [N, h, w]."""
    return len(thumbs) > 1 and int(np.abs(thumbs.astype(np.int16) - thumbs[0]).max()) <= STATIC_LEVELS


def is_black(thumbs: NDArray[np.uint8]) -> bool:
    """Whether a clip is black, from its thumbnails [N, h, w]."""
    return bool(thumbs.size) and int(thumbs.max()) <= BLACK_LEVELS


class SceneFinder:
    """PySceneDetect's adaptive content detector, fed with our own frames so that each is decoded once."""

    def __init__(self) -> None:
        self._detector, self._timecode = _load_scenedetect()
        self._count = 0
        self._last: Any = None
        self._cuts: list[int] = []

    def add(self, frame: VideoFrame) -> None:
        """Take the next frame."""
        # Counted in frames, so that a variable rate does not change which frame a cut means.
        self._last = self._timecode(self._count, fps=25.0)
        found = self._detector.process_frame(self._last, _small(frame, _SCENE_SIZE, "bgr24"))
        self._cuts += [cut.frame_num for cut in found]
        self._count += 1

    def cuts(self) -> tuple[int, ...]:
        """Return the first frame of every scene but the first."""
        if self._last is not None:
            self._cuts += [cut.frame_num for cut in self._detector.post_process(self._last)]
        return tuple(sorted({cut for cut in self._cuts if 0 < cut < self._count}))


def _load_scenedetect() -> tuple[Any, Any]:
    try:
        import scenedetect
    except ImportError as error:
        raise ConfigError(f"--scene-split needs PySceneDetect ({error}): pip install 'wan_dist[scenes]'.") from error
    return scenedetect.AdaptiveDetector(), scenedetect.FrameTimecode


def _small(frame: VideoFrame, size: tuple[int, int], pix_fmt: str) -> NDArray[np.uint8]:
    small = frame.reformat(*size, format=pix_fmt, interpolation=Interpolation.AREA, threads=1)
    return np.asarray(small.to_ndarray(), np.uint8)


def _missing(source: Source, num_decoded: int) -> MediaError | None:
    """Compare with the packets, which may hold frames that the decoder dropped without a word."""
    with open_media(source) as (container, video):
        num_shown = len(read_timeline(container, video).pts)
    if num_decoded >= num_shown:
        return None
    return MediaError("missing_frames", f"{num_decoded} of {num_shown} frames come out of the decoder; export it again")
