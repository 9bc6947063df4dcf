"""Parts of remote files kept on a local disk, the least recently used deleted first."""

import contextlib
import hashlib
import logging
import os
import threading
import zlib
from pathlib import Path
from typing import Final

from wan_dist.data.stores import Store

logger = logging.getLogger(__name__)

_CHECKSUM_BYTES: Final = 4
_SUFFIX: Final = ".part"


class CachedStore:
    """A store whose ranges are kept in a folder that several processes may share. Safe to use from several threads.

    A range is kept under the hash of its URL, version, offset and size, with a checksum: a changed object is another
    one, and a damaged copy is fetched again. A file's age is the time of its last use.
    """

    def __init__(self, store: Store, folder: Path, max_bytes: int) -> None:
        """Prepare the folder.

        Args:
            store: where ranges come from.
            folder: made if missing.
            max_bytes: size above which ranges are deleted, bytes.
        """
        self.name = store.name
        self._store, self._folder, self._max_bytes = store, folder, max_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._num_bytes = sum(size for _, size, _ in self._entries())

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises FileNotFoundError."""
        return self._store.size(name)

    def version(self, name: str) -> str:
        """Return what changes when a file's content does."""
        return self._store.version(name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on; errors are those of the store."""
        identity = "\n".join([self.name, name, self.version(name), str(self.size(name)), str(offset), str(size)])
        path = self._folder / f"{hashlib.sha256(identity.encode()).hexdigest()}{_SUFFIX}"
        kept = self._kept(path)
        if kept is None:
            kept = self._store.read_range(name, offset, size)
            self._keep(path, kept)
        return kept

    def _kept(self, path: Path) -> bytes | None:
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        content = data[_CHECKSUM_BYTES:]
        if zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little") == data[:_CHECKSUM_BYTES]:
            return content
        return None

    def _keep(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            temporary.write_bytes(zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little") + content)
            temporary.replace(path)
        except OSError as error:
            # What was fetched is at hand all the same, so a full disk only makes reading slower.
            logger.warning("%s: cannot be written (%s); reading goes on without it", path, error)
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            self._num_bytes += len(content) + _CHECKSUM_BYTES
            if self._num_bytes > self._max_bytes:
                self._shrink()

    def _shrink(self) -> None:
        """Delete the oldest ranges until a tenth is free, so that this is not done for each new one."""
        entries = self._entries()
        # Counted anew: other processes keep ranges here too.
        self._num_bytes = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if self._num_bytes <= self._max_bytes * 0.9:
                return
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                path.unlink()
            self._num_bytes -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """Return time of last use, size in bytes and path of every range."""
        found: list[tuple[int, int, Path]] = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(_SUFFIX):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found
