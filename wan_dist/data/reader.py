"""Read single samples out of shards by offset, with their checksum checked."""

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wan_dist.core.errors import DataError


@dataclass(frozen=True)
class Location:
    """Where one member lies: shard file, offset and size in bytes, CRC-32, and a name for messages."""

    path: Path
    offset: int
    size: int
    crc32: int
    name: str


def locate(tar_path: Path, row: np.void, member: str) -> Location:
    """Return where `member` (of `wan_dist.data.index.MEMBERS`) of an index row lies."""
    return Location(
        path=tar_path,
        offset=int(row[f"{member}_offset"]),
        size=int(row[f"{member}_size"]),
        crc32=int(row[f"{member}_crc32"]),
        name=f"{tar_path}: sample {row['key'].decode()}",
    )


def read_member(location: Location) -> bytes:
    """Return the bytes at `location`.

    Raises:
        DataError: the shard is gone, too short, or its content changed.
    """
    try:
        with location.path.open("rb") as stream:
            data = _pread_all(stream.fileno(), location.size, location.offset)
    except OSError as error:
        raise DataError(f"{location.name}: {error.strerror}; check the disk and the path.") from error
    if len(data) != location.size or zlib.crc32(data) != location.crc32:
        raise DataError(f"{location.name}: damaged (checksum differs); copy the shard again or pack again.")
    return data


def read_json(location: Location) -> dict[str, Any]:
    """Return the JSON object at `location`."""
    return json.loads(read_member(location))


def _pread_all(fd: int, size: int, offset: int) -> bytes:
    """One pread returns at most 2 GiB on Linux."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(fd, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
