"""Write a large file from its start to its end, hashed on the way, past the page cache where the file system allows.

A shard is hashed with SHA-256 and must be on disk before it counts as finished. Of what that costs in CPU time per MB
(one shared core with SHA instructions: hashing 0.72 ms), filling the page cache and flushing it again took 0.35 ms;
writing around it takes 0.08 ms. Content is read straight into the buffer that is written, so it is copied once.
"""

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from typing import Final, Protocol

from zlib_ng import zlib_ng

_ALIGNMENT: Final = 4096
"""Bytes of which place and size of a write past the page cache are multiples; enough for the usual disks."""

_BUFFER_BYTES: Final = 4 << 20
"""Bytes hashed and written at once. 1 MiB costs a tenth more CPU time, 8 MiB saves nothing."""


class Readable(Protocol):
    """A stream of bytes, such as `io.BytesIO` or an unbuffered file."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the head of `buffer`; return the number of bytes, 0 at the end."""
        ...


class OutputFile:
    """A new file that is written once, in order. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open `path`, which is made or emptied."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd = os.open(path, flags, 0o666)
        self._sha256 = hashlib.sha256()
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # a map begins at a page's start
        self._filled = 0
        self._written = 0

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def tell(self) -> int:
        """Return the bytes appended so far."""
        return self._written + self._filled

    def append(self, data: bytes) -> None:
        """Append some bytes."""
        done = 0
        while done < len(data):
            room = self._room()
            part = data[done : done + len(room)]
            room[: len(part)] = part
            self._filled += len(part)
            done += len(part)

    def append_from(self, content: Readable, size: int) -> int:
        """Append exactly `size` bytes of a stream; return their CRC-32.

        Raises:
            OSError: the stream ends early, or the disk is full.
        """
        crc32 = 0
        while size:
            room = self._room()[:size]
            count = content.readinto(room)
            if not count:
                raise OSError(f"unexpected end of data, {size} bytes before the end that was announced")
            crc32 = zlib_ng.crc32(room[:count], crc32)
            self._filled += count
            size -= count
        return crc32

    def finish(self) -> str:
        """Bring everything to the disk; return the SHA-256, hexadecimal. Nothing can be appended afterwards."""
        end = self.tell()
        padded = -(-self._filled // _ALIGNMENT) * _ALIGNMENT
        self._sha256.update(self._buffer[: self._filled])
        self._write(self._buffer[:padded])
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)
        return self._sha256.hexdigest()

    def _room(self) -> memoryview:
        """Return the free part of the buffer, never empty."""
        if self._filled == _BUFFER_BYTES:
            self._sha256.update(self._buffer)
            self._write(self._buffer)
            self._written += _BUFFER_BYTES
            self._filled = 0
        return self._buffer[self._filled :]

    def _write(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._fd, data[done:], self._written + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._use_page_cache():
                    raise

    def _use_page_cache(self) -> bool:
        """Write through the page cache from now on; return False if that was done already.

        Some file systems refuse only the first write, or want a coarser alignment.
        """
        direct = getattr(os, "O_DIRECT", 0)
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            if flags & direct:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~direct)
                return True
        return False
