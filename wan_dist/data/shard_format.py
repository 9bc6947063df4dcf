"""Write shards: plain, deterministic USTAR files that `webdataset` reads unchanged.

Not `webdataset.ShardWriter`: it writes under the final name, so that a killed run leaves a plausible shard, and its
float mtimes add a 1 KiB PAX header to every member, different on every run.
"""

import hashlib
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wan_dist.data.output_file import OutputFile, Readable

MAX_KEY_LENGTH: Final = 88
"""USTAR names have 100 bytes; the rest is for the longest extension, `.safetensors` of cached latents and text."""

_HASH_LENGTH: Final = 8
TMP_MARK: Final = ".tmp."
"""Part of the name of everything that is not finished."""


@dataclass(frozen=True)
class Member:
    """Where a file lies in a shard: offset and size in bytes, and its CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Committed:
    """A file that stands under its final name: size in bytes and SHA-256, hexadecimal."""

    num_bytes: int
    sha256: str


class ShardWriter:
    """An open shard. Get one from `write_shard`."""

    def __init__(self, output: OutputFile) -> None:
        self._output = output

    def add(self, name: str, size: int, content: Readable) -> Member:
        """Append a file of exactly `size` bytes read from `content`; return where it lies.

        Raises:
            OSError: `content` ends early, or the disk is full.
        """
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644  # every other field of a new TarInfo is 0 or empty
        self._output.append(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._output.tell()
        crc32 = self._output.append_from(content, size)
        self._pad(tarfile.BLOCKSIZE)
        return Member(offset, size, crc32)

    def close(self) -> None:
        """Write the end of the archive."""
        self._output.append(bytes(2 * tarfile.BLOCKSIZE))
        self._pad(tarfile.RECORDSIZE)

    def _pad(self, unit: int) -> None:
        self._output.append(bytes(-self._output.tell() % unit))


@contextmanager
def write_shard(path: Path) -> Iterator[tuple[ShardWriter, list[Committed]]]:
    """Write a shard that appears under `path` only once it is whole and on disk.

    Yields:
        The writer, and a list that holds the finished file's size and hash after the block.
    """
    result: list[Committed] = []
    with _committed(path) as temporary, OutputFile(temporary) as output:
        writer = ShardWriter(output)
        yield writer, result
        writer.close()
        sha256 = output.finish()
        result.append(Committed(output.tell(), sha256))


def write_file(path: Path, content: bytes) -> Committed:
    """Write a small file that appears under `path` only once it is whole and on disk."""
    with _committed(path) as temporary, temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return Committed(len(content), hashlib.sha256(content).hexdigest())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writers left in `folder`. Only while no writer is at work there."""
    for path in folder.glob(f".*{TMP_MARK}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sample_keys(paths: Iterable[str], with_pieces: bool = False) -> dict[str, str]:
    """Return a unique key of `[A-Za-z0-9_-]{1,88}` for every path.

    The extension is left out. Readers end a key at its first dot, so dots and all else turn into `_`; a path whose
    key is then cut, or shared with another path, gets the start of its hash appended, whatever the others are called.

    Args:
        paths: unique paths.
        with_pieces: leave room for `piece_suffix`, and let no key end like one.
    """
    longest = MAX_KEY_LENGTH - (len(piece_suffix(0)) if with_pieces else 0)
    plain = {path: re.sub(r"[^A-Za-z0-9_-]", "_", path.rpartition(".")[0] or path) for path in paths}
    shared = Counter(key.lower() for key in plain.values())

    def unique(path: str, key: str) -> str:
        like_a_piece = with_pieces and re.search(r"-p\d{4}$", key)
        if len(key) <= longest and shared[key.lower()] == 1 and not like_a_piece:
            return key
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:_HASH_LENGTH]
        return f"{key[: longest - _HASH_LENGTH - 1]}-{digest}"

    return {path: unique(path, key) for path, key in plain.items()}


def piece_suffix(number: int) -> str:
    """Return what the key of the piece with this number ends with, where one file becomes several clips."""
    return f"-p{number:04d}"


@contextmanager
def _committed(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; what the block brought to disk under it is then renamed."""
    temporary = path.with_name(f".{path.name}{TMP_MARK}{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
