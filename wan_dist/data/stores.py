"""Where shards lie: a local folder, a web server, or object storage. All of them give byte ranges by name."""

import errno
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol, cast

from wan_dist.core.errors import DataError, StorageError

FSSPEC_SCHEMES: Final = ("s3", "gs", "gcs", "hf", "file", "memory")
SCHEMES: Final = ("http", "https", *FSSPEC_SCHEMES)


_READ_AHEAD_BYTES: Final = 4 << 20


class Store(Protocol):
    """Files under one folder or URL. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """The folder or URL, for messages."""
        ...

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises FileNotFoundError."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer only at the end of the file; raises FileNotFoundError."""
        ...

    def version(self, name: str) -> str:
        """Return what changes when a file's content does: an ETag, or size and time of change."""
        ...


@dataclass(frozen=True)
class CacheLimits:
    """Where parts of remote files are kept, and how much of them, in bytes."""

    folder: Path
    max_bytes: int


@dataclass(frozen=True)
class StoredFile:
    """One file of a store."""

    store: Store
    name: str

    def __str__(self) -> str:
        return f"{self.store.name.rstrip('/')}/{self.name}"

    def read_range(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer only at the end of the file.

        Raises:
            DataError: it cannot be read.
            StorageError: its store cannot be reached, or the file changed since it was first read.
        """
        try:
            return self.store.read_range(self.name, offset, size)
        except OSError as error:
            raise DataError(f"{self}: {error.strerror or error}; check the disk and the path.") from error


def open_stream(file: StoredFile) -> IO[bytes]:
    """Return a file as a seekable stream; a remote one is read 4 MiB at a time.

    Raises:
        OSError: there is none.
        StorageError: its store cannot be reached.
    """
    if isinstance(file.store, LocalStore):
        return (file.store.folder / file.name).open("rb")
    raw = _RemoteStream(file, file.store.size(file.name))
    return cast(IO[bytes], io.BufferedReader(raw, _READ_AHEAD_BYTES))


class _RemoteStream(io.RawIOBase):
    def __init__(self, file: StoredFile, size: int) -> None:
        self._file, self._size, self._position = file, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (0, self._position, self._size)[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        data = self._file.read_range(self._position, wanted) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class LocalStore:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        """Name the folder."""
        self.folder = folder
        self.name = str(folder)

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises FileNotFoundError."""
        return (self.folder / name).stat().st_size

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer only at the end of the file."""
        with (self.folder / name).open("rb") as stream:
            return _pread_all(stream.fileno(), size, offset)

    def version(self, name: str) -> str:
        """Return size and time of change."""
        status = (self.folder / name).stat()
        return f"{status.st_size}-{status.st_mtime_ns}"


def is_remote(where: Path | str) -> bool:
    """Whether `where` is a URL and not a folder.

    Raises:
        DataError: it is a URL of an unknown kind.
    """
    scheme, mark, _ = str(where).partition("://")
    if not mark and not str(where).startswith("pipe:"):
        return False
    if scheme not in SCHEMES:
        raise DataError(f"{where}: shards are read from a folder or from {', '.join(s + '://' for s in SCHEMES)}.")
    return True


def open_store(where: Path | str, cache: CacheLimits | None = None) -> Store:
    """Return the store of a folder or URL; nothing is read yet.

    Args:
        where: folder, or URL of one.
        cache: where parts of remote files are kept; None keeps nothing.
    Raises:
        DataError: the URL is of an unknown kind, or reading it needs a package that is not installed.
    """
    if not is_remote(where):
        return LocalStore(Path(where))
    url = str(where).rstrip("/")
    if url.startswith(("http://", "https://")):
        from wan_dist.data.http_store import HttpStore

        store: Store = HttpStore(url)
    else:
        from wan_dist.data.fsspec_store import FsspecStore

        store = FsspecStore(url)
    if cache is None:
        return store
    from wan_dist.data.disk_cache import CachedStore

    return CachedStore(store, cache.folder, cache.max_bytes)


def read_whole(store: Store, name: str) -> bytes:
    """Return a file's bytes.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it came shorter than its store says.
    """
    size = store.size(name)
    data = store.read_range(name, 0, size)
    if len(data) != size:
        raise StorageError(f"{StoredFile(store, name)}: {len(data)} of {size} bytes came; check the storage.")
    return data


def missing(name: str) -> FileNotFoundError:
    """Return the error for a file that a store does not have."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)


def _pread_all(fd: int, size: int, offset: int) -> bytes:
    """One pread returns at most 2 GiB on Linux."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(fd, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
