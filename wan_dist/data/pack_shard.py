"""Write one shard of a plan: a pure function of its clips and the rules, wherever it runs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from wan_dist.core.errors import DataError
from wan_dist.data.index import ShardEntry, encode_index
from wan_dist.data.masks import mask_problem
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.pack_state import DoneShard
from wan_dist.data.plan import PlannedClip, shard_stem
from wan_dist.data.prepare import Piece, Prepared
from wan_dist.data.probe import WARNINGS, Reject
from wan_dist.data.probe_worker import Prober
from wan_dist.data.shard_format import TMP_MARK, Member, ShardWriter, write_file, write_shard
from wan_dist.data.source_files import Source
from wan_dist.data.spans import FileSpan


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        source_dir: folder that the clips' paths are relative to.
        out_dir: folder for the shard.
        number: shard number.
        clips: what goes into it.
        rules: how clips are checked, cut and filtered.
    """

    source_dir: Path
    out_dir: Path
    number: int
    clips: tuple[PlannedClip, ...]
    rules: ClipRules


class Stopped(Exception):
    """Another shard failed, so this one is not finished."""


def pack_shard(task: ShardTask, prober: Prober, on_clip: Callable[[int, list[str]], None]) -> DoneShard:
    """Write one shard and its index.

    Args:
        task: what to write.
        prober: the process that looks at the clips.
        on_clip: called after every source with its size in bytes and the codes of its rejects; may raise `Stopped`.
    Raises:
        DataError: a source changed meanwhile, or the disk is full.
    """
    stem = shard_stem(task.number)
    rows: list[tuple[Any, ...]] = []
    rejects: list[Reject] = []
    warnings: list[Reject] = []
    work_dir = task.out_dir / f".{stem}{TMP_MARK}work"
    try:
        with write_shard(task.out_dir / f"{stem}.tar") as (writer, written):
            for clip in task.clips:
                work_dir.mkdir(exist_ok=True)
                name = clip.source.path
                prepared = prober.prepare(_span(task.source_dir, clip), name, task.rules, work_dir)
                rejects += prepared.rejects
                if problem := _mask_problem(task.source_dir, clip, prepared, prober):
                    rejects.append(problem)
                    prepared = Prepared((), (*prepared.rejects, problem))
                for piece in prepared.pieces:
                    rows.append(_add_sample(writer, task.source_dir, clip, piece))
                    where = f"{name}{piece.suffix and '#' + piece.suffix[1:]}"
                    warnings += [Reject(code, where, WARNINGS[code]) for code in piece.info.warnings]
                _clear(work_dir, prepared.pieces)
                on_clip(clip.source.num_bytes, [r.code for r in prepared.rejects])
        index = write_file(task.out_dir / f"{stem}.idx.npy", encode_index(rows))
    except OSError as error:
        raise DataError(
            f"{task.out_dir / stem}.tar: {error.strerror or error}; nothing half-written was left. Make room or mend "
            "the disk, then give the same command again: finished shards are kept."
        ) from error
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)
    tar = written[0]
    entry = ShardEntry(
        name=f"{stem}.tar",
        num_clips=len(rows),
        num_bytes=tar.num_bytes,
        sha256=tar.sha256,
        index_name=f"{stem}.idx.npy",
        index_bytes=index.num_bytes,
        index_sha256=index.sha256,
    )
    return DoneShard(task.number, entry, tuple(rejects), tuple(warnings))


def _span(source_dir: Path, clip: PlannedClip) -> FileSpan:
    source = clip.source
    path = source_dir / (source.file or source.path)
    return FileSpan(path, source.offset, source.num_bytes) if source.offset else FileSpan(path)


def _clear(work_dir: Path, pieces: tuple[Piece, ...]) -> None:
    for piece in pieces:
        if piece.file:
            Path(piece.file).unlink()
    # A crash of the encoder may have left more.
    if any(work_dir.iterdir()):
        shutil.rmtree(work_dir)


def _add_sample(writer: ShardWriter, source_dir: Path, clip: PlannedClip, piece: Piece) -> tuple[Any, ...]:
    """Append a clip's members to a shard; return its index row."""
    source, info, key = clip.source, piece.info, clip.key + piece.suffix
    extension = "mp4" if piece.file else source.path.rpartition(".")[2].lower()
    described: dict[str, Any] = {"path": source.path, "captions": source.captions, **asdict(info)}
    if piece.start_s:
        described["start_s"] = piece.start_s
    if source.concept:
        described["concept"] = source.concept
    texts = (json.dumps(described, ensure_ascii=False).encode(), source.captions[0].encode())
    members = [
        writer.add(f"{key}.{suffix}", len(text), BytesIO(text))
        for suffix, text in zip(("json", "txt"), texts, strict=True)
    ]
    media = FileSpan(Path(piece.file)) if piece.file else _span(source_dir, clip)
    num_bytes = Path(piece.file).stat().st_size if piece.file else source.num_bytes
    members.append(_add_file(writer, f"{key}.{extension}", media, num_bytes))
    if source.mask:
        span = _mask_span(source_dir, source)
        members.append(_add_file(writer, f"{key}{_mask_extension(source.mask)}", span, source.mask_bytes))
    else:
        members.append(Member(0, 0, 0))
    places = [value for m in members for value in (m.offset, m.size, m.crc32)]
    numbers = (info.width, info.height, info.num_frames, info.fps, info.duration_s, info.max_gap_s)
    return (key.encode(), extension.encode(), *places, *numbers)


def _mask_problem(source_dir: Path, clip: PlannedClip, prepared: Prepared, prober: Prober) -> Reject | None:
    """Return why a clip's mask cannot be packed with it."""
    source = clip.source
    if not (source.mask and prepared.pieces):
        return None
    return mask_problem(prober.probe(_mask_span(source_dir, source), source.mask), prepared.pieces, source.path)


def _mask_span(source_dir: Path, source: Source) -> FileSpan:
    path = source_dir / (source.mask_file or source.mask)
    return FileSpan(path, source.mask_offset, source.mask_bytes) if source.mask_file else FileSpan(path)


def _mask_extension(mask: str) -> str:
    return f".mask.{mask.rpartition('.')[2].lower()}"


def _add_file(writer: ShardWriter, name: str, span: FileSpan, num_bytes: int) -> Member:
    try:
        if span.size >= 0 or span.path.stat().st_size == num_bytes:
            with span.open() as stream:
                return writer.add(name, num_bytes, stream)  # type: ignore[arg-type]
    except FileNotFoundError:
        pass
    raise DataError(f"{span.path}: changed while it was packed; run again with --restart once the folder is at rest.")
