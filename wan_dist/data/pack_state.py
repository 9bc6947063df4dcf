"""What an output folder remembers between runs of the packer: its plan, its journal and its lock."""

import fcntl
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from wan_dist.core.errors import DataError
from wan_dist.core.hashing import sha256_of
from wan_dist.data.index import MANIFEST_NAME, ShardEntry
from wan_dist.data.plan import SHARD_NAME, PackPlan
from wan_dist.data.probe import Reject
from wan_dist.data.shard_format import write_file

logger = logging.getLogger(__name__)

PLAN_NAME: Final = "plan.json"
JOURNAL_NAME: Final = "journal.jsonl"
REJECTS_NAME: Final = "rejects.jsonl"
WARNINGS_NAME: Final = "warnings.jsonl"
LOCK_NAME: Final = ".pack.lock"


@dataclass(frozen=True)
class DoneShard:
    """A finished shard, one line of the journal.

    Attributes:
        number: shard number.
        entry: what the manifest will say about it.
        rejects: planned clips that were left out.
        warnings: planned clips that were packed and are worth a look.
    """

    number: int
    entry: ShardEntry
    rejects: tuple[Reject, ...]
    warnings: tuple[Reject, ...] = ()

    def to_json(self) -> str:
        """Return the line, with its end."""
        row: dict[str, Any] = {"shard": self.number, "entry": self.entry.model_dump()}
        row["rejects"] = [asdict(r) for r in self.rejects]
        row["warnings"] = [asdict(r) for r in self.warnings]
        return json.dumps(row) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Return the shard of a line; raise ValueError, TypeError or KeyError if the line is broken."""
        row = json.loads(line)
        rejects, warnings = (tuple(Reject(**r) for r in row[name]) for name in ("rejects", "warnings"))
        return cls(row["shard"], ShardEntry(**row["entry"]), rejects, warnings)


@contextmanager
def locked(out_dir: Path) -> Iterator[None]:
    """Keep other packers out of `out_dir`. The system drops the lock with the process, however that ends."""
    with (out_dir / LOCK_NAME).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{out_dir}: another `wan-data pack` is writing there; wait for it or stop it.") from None
        yield


def settle_plan(out_dir: Path, plan: PackPlan, restart: bool) -> None:
    """Make sure that what `out_dir` holds belongs to `plan`."""
    path = out_dir / PLAN_NAME
    try:
        old: dict[str, Any] | None = json.loads(path.read_bytes())
    except FileNotFoundError:
        old = None
    except ValueError:
        old = {}
    if old is not None and old.get("digest") == plan.digest:
        return
    if old is not None and not restart:
        raise DataError(
            f"{out_dir}: holds shards of other input ({_difference(old, plan)}). Pack to another folder, or pass "
            "--restart to delete them."
        )
    if old is None and any(out_dir.glob("*.tar")):
        raise DataError(f"{out_dir}: holds .tar files that `wan-data pack` did not write; choose an empty folder.")
    # The manifest goes first, so that a kill in between leaves no folder that looks whole.
    reports = (MANIFEST_NAME, JOURNAL_NAME, REJECTS_NAME, WARNINGS_NAME)
    for pattern in (*reports, f"{SHARD_NAME}-*.tar", f"{SHARD_NAME}-*.idx.npy"):
        for stale in out_dir.glob(pattern):
            stale.unlink()
    write_file(path, json.dumps(plan.record(), indent=1).encode() + b"\n")


def _difference(old: dict[str, Any], plan: PackPlan) -> str:
    """Say what changed between a recorded plan and `plan`."""
    new = plan.record()
    changed = [f"{k} {old.get(k)} -> {new[k]}" for k in ("options", "num_clips", "num_bytes") if old.get(k) != new[k]]
    return ", ".join(changed) or "as many clips, but with changed files, names or captions"


def read_journal(out_dir: Path) -> dict[int, DoneShard]:
    """Return the shards that are finished and still there."""
    done: dict[int, DoneShard] = {}
    path = out_dir / JOURNAL_NAME
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            shard = DoneShard.from_json(line)
        except (ValueError, TypeError, KeyError):
            continue  # the last line of a killed run
        files = {shard.entry.name: shard.entry.num_bytes, shard.entry.index_name: shard.entry.index_bytes}
        if all((out_dir / n).exists() and (out_dir / n).stat().st_size == size for n, size in files.items()):
            done[shard.number] = shard
    return done


def without_damaged(out_dir: Path, done: dict[int, DoneShard], num_threads: int) -> dict[int, DoneShard]:
    """Return the shards whose files still have the hashes in the journal; the others are logged.

    Args:
        out_dir: where they lie.
        done: finished shards by number.
        num_threads: files hashed at the same time.
    """

    def is_whole(shard: DoneShard) -> bool:
        entry = shard.entry
        wanted = {entry.name: entry.sha256, entry.index_name: entry.index_sha256}
        try:
            damaged = [name for name, sha256 in wanted.items() if sha256_of(out_dir / name) != sha256]
        except OSError as error:
            damaged = [f"{error.filename}: {error.strerror}"]
        if damaged:
            logger.warning("%s: changed since it was written (%s); packing it again", out_dir, ", ".join(damaged))
        return not damaged

    with ThreadPoolExecutor(num_threads, "hash") as pool:
        whole = pool.map(is_whole, done.values())
        return {number: shard for (number, shard), good in zip(done.items(), whole, strict=True) if good}
