"""Compare every byte of packed shards with what packing wrote down."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.decode_worker import Decoder
from wan_dist.data.index import MEMBERS, ShardSet
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
        shards: opened shards.
        decoder: decode every frame of every clip too.
        on_shard: called after each shard with how many are done, and their number.
    Raises:
        StorageError: remote shards cannot be reached.
    """
    found: list[Damage] = []
    keys: dict[bytes, str] = {}
    count = len(shards.manifest.shards)
    for number in range(count):
        found += _verify_shard(shards, number, keys, decoder)
        on_shard(number + 1, count)
    if len(keys) != shards.manifest.num_clips and not found:
        found.append(Damage(shards.name, None, f"{len(keys)} keys, {shards.manifest.num_clips} clips in the manifest"))
    return found


def _verify_shard(shards: ShardSet, number: int, keys: dict[bytes, str], decoder: Decoder | None) -> list[Damage]:
    entry, tar = shards.manifest.shards[number], shards.tar(number)
    found: list[Damage] = []
    index_file = StoredFile(shards.store, entry.index_name)
    try:
        if number not in shards.rebuilt:
            digest = hashlib.sha256(read_whole(shards.store, entry.index_name)).hexdigest()
            if digest != entry.index_sha256:
                found.append(Damage(str(index_file), None, "index: its SHA-256 differs"))
        rows = shards.index(number)
    except (OSError, DataError) as error:
        return [Damage(str(index_file), None, f"index: {error}")]
    for row in rows:
        key = cast(bytes, row["key"])
        if key in keys:
            found.append(Damage(str(tar), key.decode(), f"its key is in {keys[key]} too"))
        keys[key] = entry.name
    if _sha256(tar, entry.num_bytes) != entry.sha256:
        damaged = _damaged_samples(tar, rows)
        found += damaged or [Damage(str(tar), None, "SHA-256 differs, outside of all samples")]
    if decoder:
        found += [d for row in rows if (d := _undecodable(tar, row, decoder))]
    return found


def _damaged_samples(tar: StoredFile, rows: Any) -> list[Damage]:
    found: list[Damage] = []
    for row in rows:
        for member in MEMBERS:
            where = locate(tar, row, member)
            data = tar.read_range(where.offset, where.size)
            if len(data) != where.size or zlib.crc32(data) != where.crc32:
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
