"""How a stored picture is turned and mirrored before it is shown, from a frame's display matrix.

EXIF orientations of images, `tkhd` matrices of mp4 and display orientations of H.264 and HEVC all arrive there.
`VideoFrame.rotation` gives the angle alone: of a mirrored picture it is wrong or nothing.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, cast

import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from wan_dist.data.media import MediaError

_MAX_SLANT: Final = 0.0175
"""Largest deviation from a quarter turn that is taken for rounding: one degree."""

_NUM_LATER_TYPES: Final = 8
"""Kinds of side data that a newer FFmpeg may have than PyAV has names for; FFmpeg 8.1 has 4."""


@dataclass(frozen=True)
class Orientation:
    """What makes a stored picture the one shown: first transposed, then mirrored along the axes as shown.

    Attributes:
        transposed: rows become columns.
        flip_x: left and right are exchanged.
        flip_y: top and bottom are exchanged.
    """

    transposed: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Return a view of `pixels`, [H, W, ...], as it is shown."""
        shown = pixels.swapaxes(0, 1) if self.transposed else pixels
        return shown[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


def orientation_of(frame: VideoFrame) -> Orientation:
    """Return how a decoded frame is shown.

    Raises:
        MediaError: code `odd_rotation`: by other than quarter turns and mirrors.
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return Orientation()
    # A point (x, y) is shown at (a x + c y, b x + d y); y counts downward.
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if max(abs(b), abs(c)) < _MAX_SLANT * min(abs(a), abs(d)):
        return Orientation(False, a < 0, d < 0)
    if max(abs(a), abs(d)) < _MAX_SLANT * min(abs(b), abs(c)):
        return Orientation(True, c < 0, b < 0)
    turn = -np.degrees(np.arctan2(b, a))
    raise MediaError("odd_rotation", f"turned by {turn:.0f} degrees; only quarter turns and mirrors are known")


def _display_matrix(frame: VideoFrame) -> NDArray[np.int32] | None:
    """Return the frame's display matrix, [3, 3], fixed point; None without one. Source: libavutil/display.h."""
    try:
        side_data = frame.side_data
    except ValueError:
        # PyAV cannot list the side data of a frame with a kind that it has no name for, as EXIF is.
        side_data = _without_later_types(frame).side_data
    # PyAV's stubs hide that it iterates over the data and not over their kinds, and that each is a buffer.
    found = next((data for data in cast(Any, side_data) if data.type == Type.DISPLAYMATRIX), None)
    return None if found is None else np.frombuffer(found, np.int32).reshape(3, 3).copy()


def _without_later_types(frame: VideoFrame) -> VideoFrame:
    """Return a frame of the same picture, without the side data that PyAV has no name for (0.3 ms)."""
    graph = Graph()
    graph.threads = 1
    first = max(kind.value for kind in Type) + 1
    nodes: list[Any] = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1))
    ]
    nodes += [graph.add("sidedata", f"mode=delete:type={first + number}") for number in range(_NUM_LATER_TYPES)]
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    graph.push(frame)
    return cast(VideoFrame, graph.pull())
