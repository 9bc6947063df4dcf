"""Compare every byte of packed shards with what packing wrote down."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError, StorageError
from wan_dist.data.decode_worker import Decoder
from wan_dist.data.index import MANIFEST_NAME, MEMBERS, ShardEntry, ShardSet, shards_digest
from wan_dist.data.reader import locate, read_member
from wan_dist.data.stores import StoredFile, read_whole

_PIECE_BYTES: Final = 8 << 20


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was packed.

    Attributes:
        file: the shard or index.
        sample: key of the sample it belongs to; None for the file as a whole.
        what: what was found.
    """

    file: str
    sample: str | None
    what: str


def verify_shards(
    shards: ShardSet, decoder: Decoder | None = None, on_shard: Callable[[int, int], None] = lambda _done, _all: None
) -> list[Damage]:
    """Return everything that differs from the manifest and the indexes; nothing for whole shards.

    Args:
        shards: opened shards; those of `open_unchecked` may lack files.
        decoder: decode every frame of every clip too.
        on_shard: called after each shard with how many are done, and their number.
    Raises:
        StorageError: remote shards cannot be reached.
    """
    found: list[Damage] = []
    keys: dict[bytes, str] = {}
    manifest = shards.manifest
    for number in range(len(manifest.shards)):
        found += _verify_shard(shards, number, keys, decoder)
        on_shard(number + 1, len(manifest.shards))
    if shards_digest(manifest.shards) != manifest.digest:
        where = str(StoredFile(shards.store, MANIFEST_NAME))
        found.append(Damage(where, None, "was edited (its digest does not match its shards)"))
    if len(keys) != manifest.num_clips and not found:
        found.append(Damage(shards.name, None, f"{len(keys)} keys, {manifest.num_clips} clips in the manifest"))
    return found


def _verify_shard(shards: ShardSet, number: int, keys: dict[bytes, str], decoder: Decoder | None) -> list[Damage]:
    entry, tar = shards.manifest.shards[number], shards.tar(number)
    try:
        num_bytes = shards.store.size(entry.name)
    except FileNotFoundError:
        return [*_missing_index(shards, entry), Damage(str(tar), None, "is missing")]
    rows, found = _verify_index(shards, number)
    for row in () if rows is None else rows:
        key = cast(bytes, row["key"])
        if key in keys:
            found.append(Damage(str(tar), key.decode(), f"its key is in {keys[key]} too"))
        keys[key] = entry.name
    wrong_size = num_bytes != entry.num_bytes
    if wrong_size:
        found.append(Damage(str(tar), None, f"has {num_bytes} bytes instead of {entry.num_bytes}"))
    try:
        if wrong_size or _sha256(tar, num_bytes) != entry.sha256:
            damaged = [] if rows is None else _damaged_samples(tar, rows, num_bytes)
            where = "SHA-256 differs" + (
                ", and its index cannot say where" if rows is None else ", outside of all samples"
            )
            found += damaged or ([] if wrong_size else [Damage(str(tar), None, where)])
    except StorageError:
        raise
    except DataError as error:
        return [*found, Damage(str(tar), None, str(error).removeprefix(f"{tar}: "))]
    if decoder and rows is not None:
        told = {damage.sample for damage in found}
        found += [
            d for row in rows if row["key"].decode() not in told and (d := _undecodable(tar, row, decoder)) is not None
        ]
    return found


def _verify_index(shards: ShardSet, number: int) -> tuple[Any, list[Damage]]:
    """Return a shard's index, None if it cannot be read, and what is wrong with it. A lost one is made anew."""
    entry = shards.manifest.shards[number]
    file = StoredFile(shards.store, entry.index_name)
    try:
        rows = shards.index(number)
        whole = number in shards.rebuilt or (
            hashlib.sha256(read_whole(shards.store, entry.index_name)).hexdigest() == entry.index_sha256
        )
    except StorageError:
        raise
    except (OSError, DataError) as error:
        return None, [Damage(str(file), None, f"index: {error}")]
    return rows, [] if whole else [Damage(str(file), None, "index: its SHA-256 differs")]


def _missing_index(shards: ShardSet, entry: ShardEntry) -> list[Damage]:
    try:
        shards.store.size(entry.index_name)
    except FileNotFoundError:
        return [Damage(str(StoredFile(shards.store, entry.index_name)), None, "is missing")]
    return []


def _damaged_samples(tar: StoredFile, rows: Any, num_bytes: int) -> list[Damage]:
    found: list[Damage] = []
    for row in rows:
        for member in MEMBERS:
            where = locate(tar, row, member)
            if where.offset + where.size > num_bytes:
                found.append(Damage(str(tar), row["key"].decode(), f"{member}: lies beyond the end of the file"))
            elif zlib.crc32(tar.read_range(where.offset, where.size)) != where.crc32:
                found.append(Damage(str(tar), row["key"].decode(), f"{member}: its checksum differs"))
    return found


def _undecodable(tar: StoredFile, row: np.void, decoder: Decoder) -> Damage | None:
    try:
        content = read_member(locate(tar, row, "media"))
        shape = Bucket(int(row["width"]), int(row["height"]), int(row["num_frames"]))
        fps = float(row["fps"]) or 1.0
        decoder.decode(
            content,
            Bucket(min(64, shape.width), min(64, shape.height), shape.num_frames),
            fps=fps,
            choice=0.0,
            crop_xy=(0.5, 0.5),
            allow_duplicate_frames=False,
            name=row["key"].decode(),
        )
    except DataError as error:
        return Damage(str(tar), row["key"].decode(), str(error))
    return None


def _sha256(tar: StoredFile, num_bytes: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, num_bytes, _PIECE_BYTES):
        digest.update(tar.read_range(start, min(_PIECE_BYTES, num_bytes - start)))
    return digest.hexdigest()
