"""Pack clips into shards: parallel, resumable after a kill, byte-identical for any number of workers."""

import importlib.util
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from wan_dist.core.errors import ConfigError
from wan_dist.data.index import MANIFEST_NAME
from wan_dist.data.pack_finish import finish
from wan_dist.data.pack_local import run_local
from wan_dist.data.pack_ray import run_ray
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.pack_shard import ShardTask
from wan_dist.data.pack_state import JOURNAL_NAME, DoneShard, locked, read_journal, settle_plan, without_damaged
from wan_dist.data.plan import plan_pack
from wan_dist.data.same_content import drop_same_content
from wan_dist.data.shard_format import remove_leftovers
from wan_dist.data.sources import list_sources

Executor = Callable[[Sequence[ShardTask], int, Callable[[int, list[str]], None]], Iterator[DoneShard]]

EXECUTORS: Final[dict[str, Executor]] = {"local": run_local, "ray": run_ray}
"""Where shards can be written. None of them changes a byte."""


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
        warnings: clips that were packed and are worth a look, by reason code.
        resumed_shards: shards that an earlier run had finished.
        digest: the manifest's digest.
    """

    num_clips: int
    num_shards: int
    num_bytes: int
    rejects: dict[str, int]
    warnings: dict[str, int]
    resumed_shards: int
    digest: str


def pack_clips(
    source: Path,
    out_dir: Path,
    *,
    captions_path: Path | None = None,
    source_format: str = "auto",
    rules: ClipRules | None = None,
    drop_duplicates: bool = False,
    tokenizer_path: Path | None = None,
    executor: str = "local",
    num_workers: int = 1,
    shard_bytes: int = 1_000_000_000,
    shard_clips: int = 10_000,
    restart: bool = False,
    progress: Callable[[PackProgress], None] = lambda _: None,
) -> PackResult:
    """Pack the clips of a source into shards with index and manifest; return what was made.

    A run that was killed is continued by the same call: shards in the journal are kept. The manifest comes last, so a
    folder without one is unfinished.

    Args:
        source: folder of clips, with captions beside them unless `captions_path` is given; or as for `list_sources`.
        out_dir: folder for the shards; made if missing.
        captions_path: table of captions.
        source_format: how clips and captions are kept, see `list_sources`.
        rules: how clips are checked, cut and filtered; None only checks them.
        drop_duplicates: leave out clips whose bytes an earlier clip has already.
        tokenizer_path: `tokenizer.json` or a folder with one, which counts the tokens of captions; None estimates.
        executor: a key of `EXECUTORS`.
        num_workers: shards written at the same time, each with a checking process of its own.
        shard_bytes: size at which a shard is full, bytes of source files.
        shard_clips: number of source files at which a shard is full.
        restart: throw away what `out_dir` holds of an earlier, different pack.
        progress: called after every clip, from several threads but never at once.
    Raises:
        DataError: nothing to pack, all clips rejected, or `out_dir` holds or is being written something else.
        ConfigError: an option cannot be followed here.
    """
    rules = rules or ClipRules()
    _check_options(rules, executor)
    if source.resolve() == out_dir.resolve():
        raise ConfigError(f"{out_dir}: is SRC as well as OUT; name another folder for the shards.")
    listing = list_sources(source, captions_path, source_format)
    if drop_duplicates:
        listing = drop_same_content(listing)
    plan = plan_pack(listing.sources, shard_bytes, shard_clips, rules)
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(out_dir):
        remove_leftovers(out_dir)
        settle_plan(out_dir, plan, restart)
        done = read_journal(out_dir)
        if done and (len(done) < len(plan.shards) or not (out_dir / MANIFEST_NAME).exists()):
            # A finished pack is left to `wan-data verify`: giving the command again should cost nothing.
            done = without_damaged(out_dir, done, num_workers)
        resumed = len(done)
        if resumed < len(plan.shards):
            (out_dir / MANIFEST_NAME).unlink(missing_ok=True)
        state = PackProgress(plan.num_clips, plan.num_bytes, rejects=Counter(r.code for r in listing.rejects))
        for shard in done.values():
            state.done_clips += len(plan.shards[shard.number])
            state.done_bytes += sum(c.source.num_bytes for c in plan.shards[shard.number])
            state.rejects.update(r.code for r in shard.rejects)
        progress(state)
        tasks = [
            ShardTask(listing.root, out_dir, number, clips, rules)
            for number, clips in enumerate(plan.shards)
            if number not in done
        ]
        _write_missing(tasks, EXECUTORS[executor], num_workers, done, _Reporter(state, progress))
        manifest = finish(out_dir, plan, listing, [done[n] for n in range(len(plan.shards))], tokenizer_path)
    return PackResult(
        manifest.num_clips,
        len(manifest.shards),
        manifest.num_bytes,
        manifest.rejects,
        manifest.warnings,
        resumed,
        manifest.digest,
    )


def _check_options(rules: ClipRules, executor: str) -> None:
    if executor not in EXECUTORS:
        raise ConfigError(f"--executor {executor} is not known; use one of {', '.join(EXECUTORS)}.")
    if rules.scene_split and importlib.util.find_spec("scenedetect") is None:
        raise ConfigError("--scene-split needs PySceneDetect, which is not installed: pip install 'wan_dist[scenes]'.")


class _Reporter:
    """Counts finished clips for several threads."""

    def __init__(self, state: PackProgress, callback: Callable[[PackProgress], None]) -> None:
        self._state = state
        self._callback = callback
        self._lock = threading.Lock()

    def clip_done(self, num_bytes: int, codes: list[str]) -> None:
        with self._lock:
            self._state.done_clips += 1
            self._state.done_bytes += num_bytes
            self._state.rejects.update(codes)
            self._callback(self._state)


def _write_missing(
    tasks: list[ShardTask], execute: Executor, num_workers: int, done: dict[int, DoneShard], report: _Reporter
) -> None:
    """Write the shards that are not in `done`, and add them to it and to the journal."""
    if not tasks:
        return
    with (tasks[0].out_dir / JOURNAL_NAME).open("a") as journal:
        for shard in execute(tasks, num_workers, report.clip_done):
            journal.write(shard.to_json())
            journal.flush()
            os.fsync(journal.fileno())
            done[shard.number] = shard
