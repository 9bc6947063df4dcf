"""Write cached families: by any number of ranks, resumable after a kill, byte-identical for any number of ranks.

Ranks share no memory and send no messages. A rank writes the shards of its own number first and then helps with those
that no other has begun; a lock of the kernel, which dies with its holder, says which those are. A finished shard has a
file of its own in `journal/`. Whoever finds all of them finished writes the manifest.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.torch import save

from wan_dist.core.errors import DataError
from wan_dist.core.hashing import sha256_of
from wan_dist.data.cache_sources import Encoded, Source
from wan_dist.data.family import (
    EMPTY_NAME,
    FAMILY_INDEX_DTYPE,
    FAMILY_NAME,
    FamilyManifest,
    encode_family_index,
    family_folder,
    read_fingerprint,
    shard_stem,
    size_problems,
)
from wan_dist.data.fingerprint import Kind, differences, digest_of
from wan_dist.data.index import MANIFEST_NAME, ShardEntry, ShardSet, shards_digest
from wan_dist.data.shard_format import MAX_KEY_LENGTH, remove_leftovers, write_file, write_shard

logger = logging.getLogger(__name__)

JOURNAL_NAME: Final = "journal"
_LOCK: Final = ".cache.lock"


class CacheStopped(Exception):
    """Caching was told to stop; what is finished stays."""


@dataclass(frozen=True)
class FamilyPlan:
    """A family that is to be written.

    Attributes:
        shards: the clips.
        fingerprint: what shapes the content.
        folder: where it is written.
    """

    shards: ShardSet
    fingerprint: dict[str, Any]
    folder: Path

    @classmethod
    def of(cls, shards: ShardSet, fingerprint: dict[str, Any]) -> "FamilyPlan":
        """Return the family of a fingerprint, inside the folder of its clips."""
        return cls(shards, fingerprint, family_folder(shards.folder, fingerprint))

    @property
    def kind(self) -> Kind:
        """What it holds."""
        return self.fingerprint["kind"]

    @property
    def num_shards(self) -> int:
        """Number of shards, that of the clips."""
        return len(self.shards.manifest.shards)


@dataclass(frozen=True)
class DoneShard:
    """A finished shard.

    Attributes:
        entry: what the manifest will say about it.
        problems: why clips are not in it.
    """

    entry: ShardEntry
    problems: tuple[str, ...]


@contextmanager
def exclusive(plan: FamilyPlan) -> Iterator[None]:
    """Make the family's folder and keep other commands out of it; leftovers of killed ones are removed.

    Raises:
        DataError: another command writes there, or the folder holds something else.
    """
    plan.folder.mkdir(exist_ok=True)
    with (plan.folder / _LOCK).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{plan.folder}: another `wan-data cache` is writing there; wait for it or stop it."
            ) from None
        remove_leftovers(plan.folder)
        _settle(plan)
        yield


def _settle(plan: FamilyPlan) -> None:
    path = plan.folder / FAMILY_NAME
    if path.exists():
        found = read_fingerprint(plan.folder)
        if found != plan.fingerprint:
            what = "; ".join(differences(found, plan.fingerprint)) or "its tiling"
            raise DataError(f"{plan.folder}: belongs to another cache ({what}); move it away.")
    else:
        write_file(path, json.dumps(plan.fingerprint, indent=1, sort_keys=True).encode() + b"\n")
    (plan.folder / JOURNAL_NAME).mkdir(exist_ok=True)


def write_missing(
    plan: FamilyPlan,
    source: Source,
    *,
    rank: int,
    world_size: int,
    on_clips: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write the shards that are not finished, as one of `world_size` ranks, and the manifest if none is left.

    Args:
        plan: what to write; `exclusive` has been entered, by this process or by the one that started the ranks.
        source: gives the content.
        rank: number of this rank.
        world_size: ranks at work.
        on_clips: told the clips of a finished shard that was found, and 1 for every clip written.
        should_stop: asked after every clip.
    Raises:
        CacheStopped: `should_stop` said so.
        DataError: the clips' shards are damaged, or every clip of the family failed.
    """
    empty = source.empty()
    if empty is not None and not (plan.folder / EMPTY_NAME).exists():
        write_file(plan.folder / EMPTY_NAME, save(empty))
    own = range(rank, plan.num_shards, world_size)
    others = [number for number in range(plan.num_shards) if number not in own]
    for number in [*own, *others]:
        with _claimed(plan, number) as free:
            # Each rank hashes its own share of what was finished before; the sizes of the others' are enough here.
            if not free or (number not in own and read_done(plan, number)):
                continue
            if verified(plan, number):
                on_clips(source.num_clips(number))
                continue
            done = _write_shard(plan, number, source.samples(number), on_clips, should_stop)
            write_file(_journal_path(plan, number), _to_json(done))
    finish(plan)


@contextmanager
def _claimed(plan: FamilyPlan, number: int) -> Iterator[bool]:
    with (plan.folder / JOURNAL_NAME / f".{number:06d}.lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _write_shard(
    plan: FamilyPlan,
    number: int,
    samples: Iterator[Encoded],
    on_clips: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> DoneShard:
    stem = shard_stem(plan.kind, number)
    index = np.zeros(len(plan.shards.index(number)), FAMILY_INDEX_DTYPE)
    index["key"] = plan.shards.index(number)["key"]
    problems: list[str] = []
    with write_shard(plan.folder / f"{stem}.tar") as (writer, written):
        for sample in samples:
            if should_stop():
                raise CacheStopped
            on_clips(1)
            if sample.tensors is None:
                problems.append(sample.problem)
                logger.warning("left out: %s", sample.problem)
                continue
            key = index["key"][sample.row].decode()
            if len(key) > MAX_KEY_LENGTH:
                raise DataError(f"{plan.shards.tar_path(number)}: key {key} is too long for a member; pack again.")
            content = save(sample.tensors)
            member = writer.add(f"{key}.safetensors", len(content), BytesIO(content))
            index[sample.row] = (index["key"][sample.row], member.offset, member.size, member.crc32)
    rows = write_file(plan.folder / f"{stem}.idx.npy", encode_family_index(index))
    entry = ShardEntry(
        name=f"{stem}.tar",
        num_clips=int((index["size"] > 0).sum()),
        num_bytes=written[0].num_bytes,
        sha256=written[0].sha256,
        index_name=f"{stem}.idx.npy",
        index_bytes=rows.num_bytes,
        index_sha256=rows.sha256,
    )
    return DoneShard(entry, tuple(problems))


def finish(plan: FamilyPlan) -> FamilyManifest | None:
    """Write the manifest if every shard is finished, and return it; None if some are not.

    Raises:
        DataError: not one clip could be encoded.
    """
    shards = [read_done(plan, number) for number in range(plan.num_shards)]
    done = [shard for shard in shards if shard is not None]
    if len(done) < plan.num_shards:
        return None
    entries = tuple(shard.entry for shard in done)
    problems = [problem for shard in done for problem in shard.problems]
    if problems and not any(entry.num_clips for entry in entries):
        raise DataError(f"{plan.folder}: none of {len(problems)} clips could be encoded; the first: {problems[0]}")
    files = [EMPTY_NAME] if (plan.folder / EMPTY_NAME).exists() else []
    manifest = FamilyManifest(
        kind=plan.kind,
        fingerprint=plan.fingerprint,
        fingerprint_sha256=digest_of(plan.fingerprint),
        digest=shards_digest(entries),
        num_clips=sum(entry.num_clips for entry in entries),
        num_bytes=sum(entry.num_bytes for entry in entries),
        rejects={"not_encoded": len(problems)} if problems else {},
        shards=entries,
        files={name: sha256_of(plan.folder / name) for name in files},
    )
    write_file(plan.folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def read_done(plan: FamilyPlan, number: int) -> DoneShard | None:
    """Return what the journal says about a shard whose files are there with their sizes; None if it is not finished."""
    try:
        row = json.loads(_journal_path(plan, number).read_bytes())
        done = DoneShard(ShardEntry(**row["entry"]), tuple(row["problems"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        logger.warning("%s is not readable; the shard is written again", _journal_path(plan, number))
        return None
    return None if size_problems(plan.folder, done.entry) else done


def verified(plan: FamilyPlan, number: int) -> bool:
    """Return whether a shard is finished and every byte of it is what was written."""
    done = read_done(plan, number)
    if done is None:
        return False
    entry = done.entry
    for name, sha256 in ((entry.name, entry.sha256), (entry.index_name, entry.index_sha256)):
        if sha256_of(plan.folder / name) != sha256:
            logger.warning("%s is damaged (checksum differs); it is written again", plan.folder / name)
            _journal_path(plan, number).unlink()
            return False
    return True


def _journal_path(plan: FamilyPlan, number: int) -> Path:
    return plan.folder / JOURNAL_NAME / f"{number:06d}.json"


def _to_json(done: DoneShard) -> bytes:
    return json.dumps({"entry": done.entry.model_dump(), "problems": done.problems}, indent=1).encode() + b"\n"
