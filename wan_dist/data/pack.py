"""Pack clips into shards: parallel, resumable after a kill, byte-identical for any number of workers."""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from wan_dist.core.errors import DataError
from wan_dist.data.index import MANIFEST_NAME, Manifest, ShardEntry, encode_index, shards_digest
from wan_dist.data.pack_state import (
    JOURNAL_NAME,
    REJECTS_NAME,
    DoneShard,
    locked,
    read_journal,
    settle_plan,
)
from wan_dist.data.plan import PackPlan, PlannedClip, plan_pack, shard_stem
from wan_dist.data.probe import ClipInfo, Reject
from wan_dist.data.probe_worker import Prober
from wan_dist.data.shard_format import Member, ShardWriter, remove_leftovers, write_file, write_shard
from wan_dist.data.sources import Listing, list_sources


@dataclass
class PackProgress:
    """How far packing is. Counts include the shards that an earlier run had finished."""

    num_clips: int
    num_bytes: int
    done_clips: int = 0
    done_bytes: int = 0
    rejects: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class PackResult:
    """What packing made.

    Attributes:
        num_clips: clips in the shards.
        num_shards: shards.
        num_bytes: size of all shards, bytes.
        rejects: clips left out and caption rows without a clip, by reason code.
        resumed_shards: shards that an earlier run had finished.
        digest: the manifest's digest.
    """

    num_clips: int
    num_shards: int
    num_bytes: int
    rejects: dict[str, int]
    resumed_shards: int
    digest: str


def pack_clips(
    source_dir: Path,
    out_dir: Path,
    *,
    captions_path: Path | None = None,
    num_workers: int = 1,
    shard_bytes: int = 1_000_000_000,
    shard_clips: int = 10_000,
    restart: bool = False,
    progress: Callable[[PackProgress], None] = lambda _: None,
) -> PackResult:
    """Pack the clips of a folder into shards with index and manifest; return what was made.

    A run that was killed is continued by the same call: shards in the journal are kept. The manifest comes last, so a
    folder without one is unfinished.

    Args:
        source_dir: folder of clips, with captions beside them unless `captions_path` is given.
        out_dir: folder for the shards; made if missing.
        captions_path: JSON lines file of captions.
        num_workers: shards written at the same time, each with a probing process of its own.
        shard_bytes: size at which a shard is full, bytes.
        shard_clips: number of clips at which a shard is full.
        restart: throw away what `out_dir` holds of an earlier, different pack.
        progress: called after every clip, from several threads but never at once.
    Raises:
        DataError: nothing to pack, all clips rejected, or `out_dir` holds or is being written something else.
    """
    listing = list_sources(source_dir, captions_path)
    plan = plan_pack(listing.sources, shard_bytes, shard_clips)
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(out_dir):
        remove_leftovers(out_dir)
        settle_plan(out_dir, plan, restart)
        done = read_journal(out_dir)
        resumed = len(done)
        if resumed < len(plan.shards):
            (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
        state = PackProgress(plan.num_clips, plan.num_bytes, rejects=Counter(r.code for r in listing.rejects))
        for shard in done.values():
            state.done_clips += len(plan.shards[shard.number])
            state.done_bytes += sum(c.source.num_bytes for c in plan.shards[shard.number])
            state.rejects.update(r.code for r in shard.rejects)
        progress(state)
        _write_missing(source_dir, out_dir, plan, done, num_workers, _Reporter(state, progress))
        manifest = _finish(out_dir, plan, listing, [done[n] for n in range(len(plan.shards))])
    return PackResult(
        manifest.num_clips, len(manifest.shards), manifest.num_bytes, manifest.rejects, resumed, manifest.digest
    )


class _Reporter:
    """Counts finished clips for several threads."""

    def __init__(self, state: PackProgress, callback: Callable[[PackProgress], None]) -> None:
        self._state = state
        self._callback = callback
        self._lock = threading.Lock()

    def clip_done(self, num_bytes: int, reject: Reject | None) -> None:
        with self._lock:
            self._state.done_clips += 1
            self._state.done_bytes += num_bytes
            if reject is not None:
                self._state.rejects[reject.code] += 1
            self._callback(self._state)


def _write_missing(
    source_dir: Path, out_dir: Path, plan: PackPlan, done: dict[int, DoneShard], num_workers: int, report: _Reporter
) -> None:
    """Write the shards that are not in `done`, and add them to it and to the journal.

    Threads write and hash (both without the interpreter lock); what can crash, FFmpeg, runs in a process per thread.
    """
    missing = [number for number in range(len(plan.shards)) if number not in done]
    stopping = threading.Event()

    def write(number: int) -> DoneShard:
        prober = idle.get()
        try:
            return _write_shard(source_dir, out_dir, number, plan.shards[number], prober, report, stopping)
        finally:
            idle.put(prober)

    with ExitStack() as stack:
        idle: SimpleQueue[Prober] = SimpleQueue()
        for _ in range(num_workers):
            idle.put(stack.enter_context(Prober()))
        journal = stack.enter_context((out_dir / JOURNAL_NAME).open("a"))
        pool = stack.enter_context(ThreadPoolExecutor(num_workers, "pack"))
        try:
            for future in as_completed([pool.submit(write, number) for number in missing]):
                shard = future.result()
                journal.write(shard.to_json())
                journal.flush()
                os.fsync(journal.fileno())
                done[shard.number] = shard
        except BaseException:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _write_shard(
    source_dir: Path,
    out_dir: Path,
    number: int,
    clips: tuple[PlannedClip, ...],
    prober: Prober,
    report: _Reporter,
    stopping: threading.Event,
) -> DoneShard:
    """Write one shard and its index."""
    stem = shard_stem(number)
    rows: list[tuple[Any, ...]] = []
    rejects: list[Reject] = []
    with write_shard(out_dir / f"{stem}.tar") as (writer, written):
        for clip in clips:
            if stopping.is_set():
                raise DataError("packing was stopped")
            info = prober.probe(source_dir / clip.source.path, clip.source.path)
            if isinstance(info, Reject):
                rejects.append(info)
            else:
                rows.append(_add_sample(writer, source_dir, clip, info))
            report.clip_done(clip.source.num_bytes, info if isinstance(info, Reject) else None)
    tar = written[0]
    index = write_file(out_dir / f"{stem}.idx.npy", encode_index(rows))
    entry = ShardEntry(
        name=f"{stem}.tar",
        num_clips=len(rows),
        num_bytes=tar.num_bytes,
        sha256=tar.sha256,
        index_name=f"{stem}.idx.npy",
        index_bytes=index.num_bytes,
        index_sha256=index.sha256,
    )
    return DoneShard(number, entry, tuple(rejects))


def _add_sample(writer: ShardWriter, source_dir: Path, clip: PlannedClip, info: ClipInfo) -> tuple[Any, ...]:
    """Append a clip's members to a shard; return its index row."""
    extension = clip.source.path.rpartition(".")[2].lower()
    described = {"path": clip.source.path, "captions": clip.source.captions, **asdict(info)}
    texts = (json.dumps(described, ensure_ascii=False).encode(), clip.source.captions[0].encode())
    members = [
        writer.add(f"{clip.key}.{suffix}", len(text), BytesIO(text))
        for suffix, text in zip(("json", "txt"), texts, strict=True)
    ]
    members.append(_add_file(writer, f"{clip.key}.{extension}", source_dir / clip.source.path, clip.source.num_bytes))
    places = [value for m in members for value in (m.offset, m.size, m.crc32)]
    numbers = (info.width, info.height, info.num_frames, info.fps, info.duration_s, info.max_gap_s)
    return (clip.key.encode(), extension.encode(), *places, *numbers)


def _add_file(writer: ShardWriter, name: str, path: Path, num_bytes: int) -> Member:
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == num_bytes:
                return writer.add(name, num_bytes, stream)
    except FileNotFoundError:
        pass
    raise DataError(f"{path}: changed while it was packed; run again with --restart once the folder is at rest.")


def _finish(out_dir: Path, plan: PackPlan, listing: Listing, shards: list[DoneShard]) -> Manifest:
    """Write rejects, the journal in order of shards, and last the manifest."""
    rejects = [*listing.rejects, *(r for shard in shards for r in shard.rejects)]
    lines = (json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in sorted(rejects, key=lambda r: (r.path, r.code)))
    write_file(out_dir / REJECTS_NAME, "".join(lines).encode())
    by_code = dict(sorted(Counter(r.code for r in rejects).items()))
    entries = tuple(shard.entry for shard in shards)
    num_clips = sum(e.num_clips for e in entries)
    if not num_clips:
        reasons = ", ".join(f"{count} {code}" for code, count in by_code.items())
        first = rejects[0]
        raise DataError(
            f"{out_dir}: every clip was rejected ({reasons}), so there is nothing to train on. First: {first.path}: "
            f"{first.hint}. All are in {out_dir / REJECTS_NAME}."
        )
    write_file(out_dir / JOURNAL_NAME, "".join(shard.to_json() for shard in shards).encode())
    manifest = Manifest(
        digest=shards_digest(entries),
        plan_digest=plan.digest,
        num_clips=num_clips,
        num_bytes=sum(e.num_bytes for e in entries),
        rejects=by_code,
        shards=entries,
    )
    write_file(out_dir / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest
