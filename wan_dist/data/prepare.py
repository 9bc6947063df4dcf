"""Turn one source file into the clips that are packed: check, cut, encode and filter it."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from av.error import FFmpegError
from numpy.typing import NDArray

from wan_dist.core.errors import DataError
from wan_dist.data.examine import examine, is_black, is_static
from wan_dist.data.media import MediaError, Source, open_media, read_timeline, told
from wan_dist.data.pack_rules import TRANSCODE_SIZES, ClipRules
from wan_dist.data.probe import ClipInfo, Reject, probe_clip
from wan_dist.data.shard_format import piece_suffix
from wan_dist.data.transcode import Segment, transcode

SALVAGEABLE: Final = ("truncated", "corrupt", "missing_frames", "resolution_change", "repeated_timestamps")
"""Reasons before which whole frames may lie."""

_LENGTH_SLACK_S: Final = 0.1
"""A clip this near to the longest length may have to be cut; its stamps decide."""

MIN_FREE_BYTES: Final = 1 << 16
"""With less room than this on the disk for encoded clips, a failure is the disk's."""


@dataclass(frozen=True)
class Piece:
    """A clip to pack.

    Attributes:
        suffix: what its key ends with; empty unless one file may become several clips.
        info: what the index says about it.
        file: the encoded clip; empty where the source's own bytes are packed.
        start_s: where it starts in the source, seconds.
    """

    suffix: str
    info: ClipInfo
    file: str = ""
    start_s: float = 0.0

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Self:
        """Return the piece that `dataclasses.asdict` made a row of."""
        info = row["info"]
        return cls(**{**row, "info": ClipInfo(**{**info, "warnings": tuple(info["warnings"])})})


@dataclass(frozen=True)
class Prepared:
    """What becomes of a source: clips, and parts of it that are left out."""

    pieces: tuple[Piece, ...]
    rejects: tuple[Reject, ...]


@dataclass(frozen=True)
class _Frames:
    """The whole frames of a clip: stamps [N] in units of `time_base`, scene starts, and thumbnails or none."""

    pts: NDArray[np.int64]
    time_base: Fraction
    cuts: tuple[int, ...] = ()
    thumbs: NDArray[np.uint8] | None = None


def prepare_clip(
    source: Source, name: str, rules: ClipRules, work_dir: Path, tick: Callable[[], None] = lambda: None
) -> Prepared:
    """Return the clips that a file becomes under `rules`. Never raises on a bad file.

    Args:
        source: the file.
        name: how a `Reject` names it.
        rules: what to do.
        work_dir: empty folder for encoded clips.
        tick: called now and then, as a sign of life.
    Raises:
        DataError: the disk is full.
    """
    try:
        return _prepare(source, name, rules, work_dir, tick)
    except MediaError as error:
        _check_room(work_dir)
        return Prepared((), (Reject(error.code, name, error.hint),))
    except (FFmpegError, OSError, ValueError) as error:
        _check_room(work_dir)
        return Prepared((), (Reject("undecodable", name, f"{told(error)}; export it again"),))


def _check_room(work_dir: Path) -> None:
    """Blame the disk and not the clip where an encoded clip may have found no room."""
    disk = os.statvfs(work_dir)
    if disk.f_bavail * disk.f_frsize < MIN_FREE_BYTES:
        raise DataError(
            f"{work_dir.parent}: No space left on device; nothing half-written was left. Make room, then give the same "
            "command again: finished shards are kept."
        )


def _prepare(source: Source, name: str, rules: ClipRules, work_dir: Path, tick: Callable[[], None]) -> Prepared:
    found = probe_clip(source, name, allow_hdr=rules.tonemap, trust_header=rules.verify == "none")
    salvaged = isinstance(found, Reject)
    if isinstance(found, Reject):
        if not (rules.salvage and found.code in SALVAGEABLE):
            return Prepared((), (found,))
    elif found.fps == 0:
        return _filtered([Piece(piece_suffix(0) if rules.splits else "", found)], name, rules)
    if salvaged or rules.looks_at_frames:
        try:
            seen = examine(source, find_scenes=rules.scene_split, tick=tick)
        except MediaError:
            if isinstance(found, Reject):
                return Prepared((), (found,))  # nothing to salvage
            raise
        if seen.problem is not None and not rules.salvage:
            raise seen.problem
        salvaged = salvaged or seen.problem is not None
        frames = _Frames(seen.pts, seen.time_base, seen.cuts, seen.thumbs)
    elif isinstance(found, ClipInfo) and not _may_be_encoded(found, rules):
        return _filtered([Piece(piece_suffix(0) if rules.splits else "", found)], name, rules)
    else:
        frames = _Frames(*_stamps(source))
    ranges = _cut(frames, rules)
    encode = bool(salvaged or rules.transcode or len(ranges) > 1)
    if not encode and isinstance(found, ClipInfo):
        encode = _needs_mending(found, rules)
    if not encode:
        assert isinstance(found, ClipInfo)
        return _filtered(
            [Piece(piece_suffix(0) if rules.splits else "", _marked(found, frames, ranges[0]))], name, rules
        )
    marks = ("salvaged",) if salvaged else ()
    marks += ("tone_mapped",) if isinstance(found, ClipInfo) and "tone_mapped" in found.warnings else ()
    return _encoded(source, name, frames, ranges, rules, work_dir, marks, tick)


def _may_be_encoded(info: ClipInfo, rules: ClipRules) -> bool:
    """Whether stamps are needed: they cost as much as all the rest of a probe."""
    too_long = rules.max_clip_s is not None and info.duration_s > rules.max_clip_s - _LENGTH_SLACK_S
    return bool(rules.transcode) or too_long or _needs_mending(info, rules)


def _needs_mending(info: ClipInfo, rules: ClipRules) -> bool:
    return (rules.deinterlace and "interlaced" in info.warnings) or "tone_mapped" in info.warnings


def _stamps(source: Source) -> tuple[NDArray[np.int64], Fraction]:
    with open_media(source) as (container, video):
        timeline = read_timeline(container, video)
    return timeline.pts, timeline.time_base


def _cut(frames: _Frames, rules: ClipRules) -> list[tuple[int, int]]:
    """Return first and last frame of every part: scenes, and equal parts of those that are too long."""
    bounds = [0, *frames.cuts, len(frames.pts)]
    scenes = [(first, end - 1) for first, end in itertools.pairwise(bounds)]
    if rules.max_clip_s is None:
        return scenes
    seconds = (frames.pts - frames.pts[0]) * float(frames.time_base)
    frame_s = float(seconds[-1]) / max(1, len(seconds) - 1)
    parts: list[tuple[int, int]] = []
    for first, last in scenes:
        length_s = float(seconds[last] - seconds[first]) + frame_s
        num_parts = max(1, int(np.ceil(length_s / rules.max_clip_s - 1e-6)))
        starts = seconds[first] + np.arange(1, num_parts) * length_s / num_parts
        inner = (np.searchsorted(seconds[first : last + 1], starts - frame_s * 1e-3) + first).tolist()
        edges = sorted({first, *inner, last + 1})
        parts += [(start, end - 1) for start, end in itertools.pairwise(edges)]
    return parts


def _encoded(
    source: Source,
    name: str,
    frames: _Frames,
    ranges: list[tuple[int, int]],
    rules: ClipRules,
    work_dir: Path,
    marks: tuple[str, ...],
    tick: Callable[[], None],
) -> Prepared:
    """Encode each part into a file of its own, and probe what came out."""
    files = [work_dir / f"{number:04d}.mp4" for number in range(len(ranges))]
    parts = [
        (Segment(int(frames.pts[first]), int(frames.pts[last])), file)
        for (first, last), file in zip(ranges, files, strict=True)
    ]
    cover = TRANSCODE_SIZES[rules.transcode] if rules.transcode else None
    transcode(source, parts, cover=cover, deinterlace=rules.deinterlace, tonemap=rules.tonemap, tick=tick)
    pieces: list[Piece] = []
    for number, ((first, last), file) in enumerate(zip(ranges, files, strict=True)):
        info = probe_clip(file, name)
        if isinstance(info, Reject) or info.num_frames != last - first + 1:
            found = info.hint if isinstance(info, Reject) else f"{info.num_frames} frames"
            raise MediaError("transcode_failed", f"{last - first + 1} frames became: {found}; transcode it yourself")
        info = _marked(info, frames, (first, last))
        info = replace(info, warnings=(*marks, *info.warnings))
        start_s = float((frames.pts[first] - frames.pts[0]) * frames.time_base)
        pieces.append(Piece(piece_suffix(number) if rules.splits else "", info, str(file), start_s))
    return _filtered(pieces, name, rules)


def _marked(info: ClipInfo, frames: _Frames, part: tuple[int, int]) -> ClipInfo:
    """Add what the thumbnails of a part show."""
    if frames.thumbs is None:
        return info
    thumbs = frames.thumbs[part[0] : part[1] + 1]
    if is_black(thumbs):
        return replace(info, warnings=(*info.warnings, "black"))
    return replace(info, warnings=(*info.warnings, "static")) if is_static(thumbs) else info


def _filtered(pieces: list[Piece], name: str, rules: ClipRules) -> Prepared:
    """Drop the pieces that the user does not want."""
    kept: list[Piece] = []
    rejects: list[Reject] = []
    for piece in pieces:
        reason = _unwanted(piece.info, rules)
        if reason is None:
            kept.append(piece)
        else:
            rejects.append(Reject(reason[0], f"{name}{piece.suffix and '#' + piece.suffix[1:]}", reason[1]))
    return Prepared(tuple(kept), tuple(rejects))


def _unwanted(info: ClipInfo, rules: ClipRules) -> tuple[str, str] | None:
    side = min(info.width, info.height)
    if rules.min_side_px is not None and side < rules.min_side_px:
        return "too_small", f"{info.width}x{info.height} px; --min-side asks for {rules.min_side_px}"
    if info.fps and rules.min_seconds is not None and info.duration_s < rules.min_seconds:
        return "too_short", f"{info.duration_s:.2f} s; --min-seconds asks for {rules.min_seconds:g}"
    if info.fps and rules.max_seconds is not None and info.duration_s > rules.max_seconds:
        return "too_long", f"{info.duration_s:.2f} s; --max-seconds allows {rules.max_seconds:g}"
    for code, dropped in (("static", rules.drop_static), ("black", rules.drop_black)):
        if dropped and code in info.warnings:
            return code, f"left out by --drop-{code}"
    return None
