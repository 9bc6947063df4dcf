"""Read single samples out of shards by offset, with their checksum checked."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from wan_dist.core.errors import DataError, StorageError
from wan_dist.data.stores import LocalStore, StoredFile

CAPTION_KEYS: Final = ("captions", "caption", "text", "prompt")
"""Under which names a sample's json may hold its caption or captions; the first that is there counts."""


@dataclass(frozen=True)
class Location:
    """Where one member lies: shard file, offset and size in bytes, CRC-32, and a name for messages."""

    file: StoredFile
    offset: int
    size: int
    crc32: int
    name: str


def locate(shard: Path | StoredFile, row: np.void, member: str) -> Location:
    """Return where `member` (of `wan_dist.data.index.MEMBERS`) of an index row lies."""
    file = StoredFile(LocalStore(shard.parent), shard.name) if isinstance(shard, Path) else shard
    return Location(
        file=file,
        offset=int(row[f"{member}_offset"]),
        size=int(row[f"{member}_size"]),
        crc32=int(row[f"{member}_crc32"]),
        name=f"{file}: sample {row['key'].decode()}",
    )


def read_member(location: Location) -> bytes:
    """Return the bytes at `location`.

    Raises:
        DataError: the shard is gone, too short, or its content changed.
        StorageError: its storage cannot be reached, or the shard was replaced since it was first read.
    """
    try:
        data = location.file.read_range(location.offset, location.size)
    except StorageError:
        raise
    except DataError as error:
        raise DataError(f"{location.name}: {str(error).removeprefix(f'{location.file}: ')}") from error
    if len(data) != location.size or zlib.crc32(data) != location.crc32:
        raise DataError(f"{location.name}: damaged (checksum differs); copy the shard again or pack again.")
    return data


def read_json(location: Location) -> dict[str, Any]:
    """Return the JSON object at `location`.

    Raises:
        DataError: as `read_member`, or it is no JSON object.
    """
    try:
        value = json.loads(read_member(location))
    except ValueError as error:
        raise DataError(f"{location.name}: its json is not readable ({error}); pack again.") from error
    if not isinstance(value, dict):
        raise DataError(f"{location.name}: its json is a {type(value).__name__}, not an object; pack again.")
    return value


def read_captions(shard: StoredFile, row: np.void) -> tuple[str, ...]:
    """Return the captions of a sample, from its json or else its txt.

    Raises:
        DataError: as `read_json`, or there is none.
    """
    if row["json_size"]:
        described = read_json(locate(shard, row, "json"))
        for key in CAPTION_KEYS:
            value = described.get(key)
            captions = [value] if isinstance(value, str) else value
            if isinstance(captions, list) and captions and all(isinstance(c, str) and c for c in captions):
                return tuple(captions)
    if row["text_size"]:
        text = read_member(locate(shard, row, "text")).decode("utf-8-sig", "replace").strip()
        if text:
            return (text,)
    raise DataError(f"{shard}: sample {row['key'].decode()}: no caption in its json or txt; add one and pack again.")
