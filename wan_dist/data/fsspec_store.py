"""Shards in object storage, read by range through fsspec: `s3://`, `gs://`, `hf://` and the like."""

import threading
from typing import Any

from wan_dist.core.errors import DataError, StorageError
from wan_dist.data.retry import RetryPolicy, TransientError, retry
from wan_dist.data.stores import missing

_VERSION_KEYS = ("ETag", "etag", "generation", "blob_id", "mtime", "created", "last_modified")


class FsspecStore:
    """The files under a URL. Safe to use from several threads.

    A file's version is fixed when its size is first asked for; content that does not match its checksum is then told
    from a file that was replaced.
    """

    def __init__(self, url: str, *, policy: RetryPolicy | None = None) -> None:
        """Open the file system; nothing is read yet.

        Args:
            url: folder, without a trailing slash.
            policy: how failures are met.
        Raises:
            DataError: fsspec or what it needs for this kind of URL is not installed.
        """
        try:
            import fsspec

            self._files: Any
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: {error}; install wan_dist[remote] and what your storage needs.") from error
        self.name = url
        self._policy = policy or RetryPolicy()
        self._pinned: dict[str, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises FileNotFoundError."""
        return self._pin(name)[0]

    def version(self, name: str) -> str:
        """Return a file's ETag or generation, or when it was changed."""
        return self._pin(name)[1]

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer only at the end of the file.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: the storage cannot be reached, or the file changed.
        """
        total, _ = self._pin(name)
        wanted = max(0, min(size, total - offset))
        if not wanted:
            return b""

        def get() -> bytes:
            data = self._call(lambda: self._files.cat_file(self._path(name), start=offset, end=offset + wanted), name)
            if len(data) != wanted:
                self.check_unchanged(name)
                raise TransientError(f"{len(data)} of {wanted} bytes came")
            return data

        return retry(get, f"{self.name}/{name}", self._policy)

    def check_unchanged(self, name: str) -> None:
        """Return if a file is still the one that was first seen.

        Raises:
            StorageError: it is not.
        """
        known, found = self._pin(name), self._info(name)
        if known != found:
            raise StorageError(
                f"{self.name}/{name}: changed while it was read: {known[0]} bytes, {known[1]} became {found[0]} bytes, "
                f"{found[1]}; leave shards in place while they are trained on, and start again."
            )

    def _pin(self, name: str) -> tuple[int, str]:
        if name not in self._pinned:
            found = retry(lambda: self._info(name), f"{self.name}/{name}", self._policy)
            with self._lock:
                self._pinned.setdefault(name, found)
        return self._pinned[name]

    def _info(self, name: str) -> tuple[int, str]:
        # Its listing may be cached from before the file was replaced.
        self._files.invalidate_cache()
        info = self._call(lambda: self._files.info(self._path(name)), name)
        return int(info["size"]), next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")

    def _call(self, call: Any, name: str) -> Any:
        try:
            return call()
        except FileNotFoundError:
            raise missing(name) from None
        except PermissionError as error:
            raise StorageError(f"{self.name}/{name}: not allowed to read it ({error}); check credentials.") from error
        except (OSError, TimeoutError) as error:
            raise TransientError(str(error) or type(error).__name__) from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
