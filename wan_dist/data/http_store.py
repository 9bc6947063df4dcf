"""Shards on a web server, read by range requests.

urllib3 and not requests, which brings sessions, cookies and environment proxies for nothing here, nor httpx: its pool
of connections is the fastest of the three from threads, and it notices a body that is shorter than announced.
"""

import re
import threading
import time
from typing import Any, Final
from urllib.parse import quote

import urllib3
from urllib3.exceptions import HTTPError

from wan_dist.core.errors import DataError, StorageError
from wan_dist.data.retry import RetryPolicy, TransientError, retry
from wan_dist.data.stores import missing

_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE: Final = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<total>\d+)")
_PIECE_BYTES: Final = 1 << 20
_MAX_CONNECTIONS: Final = 64


class HttpStore:
    """The files under a URL. Safe to use from several threads.

    The first answer about a file fixes its ETag and size for this process; one that differs later is an error, since
    the index that was read belongs to the earlier content.
    """

    def __init__(
        self,
        url: str,
        *,
        policy: RetryPolicy | None = None,
        timeout_s: float = 30.0,
        min_bytes_per_s: float = 50_000.0,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            url: `http://` or `https://`, without a trailing slash.
            policy: how failures are met.
            timeout_s: seconds without any byte after which a try has failed.
            min_bytes_per_s: slower than this, after `timeout_s`, a try has failed too.
        """
        self.name = url
        self._policy = policy or RetryPolicy()
        self._timeout_s, self._min_bytes_per_s = timeout_s, min_bytes_per_s
        self._pool = urllib3.PoolManager(
            maxsize=_MAX_CONNECTIONS,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
            headers={"Accept-Encoding": "identity", "User-Agent": "wan_dist"},
        )
        self._pinned: dict[str, tuple[int, str]] = {}
        self._lock = threading.Lock()

    def size(self, name: str) -> int:
        """Return a file's size in bytes; raises FileNotFoundError."""
        return self._pin(name)[0]

    def version(self, name: str) -> str:
        """Return a file's ETag, or when it was changed where the server gives none."""
        return self._pin(name)[1]

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer only at the end of the file.

        Raises:
            FileNotFoundError: there is no such file.
            StorageError: the server cannot be reached, knows no ranges, or the file changed.
        """
        if size <= 0:
            return b""
        return retry(lambda: self._get(name, offset, size), self._url(name), self._policy)

    def _pin(self, name: str) -> tuple[int, str]:
        """Return size and version of a file, asking for its first byte if they are not known yet."""
        if name not in self._pinned:
            # Not HEAD: presigned URLs and some gateways refuse it, and this shows whether ranges work.
            self.read_range(name, 0, 1)
        return self._pinned[name]

    def _url(self, name: str) -> str:
        return f"{self.name}/{quote(name)}"

    def _get(self, name: str, offset: int, size: int) -> bytes:
        url, whole = self._url(name), False
        try:
            response = self._pool.request(
                "GET", url, headers={"Range": f"bytes={offset}-{offset + size - 1}"}, preload_content=False
            )
        except HTTPError as error:
            raise TransientError(_reason(error)) from error
        try:
            if response.status == 416:  # the range begins behind the end
                self._pinned.setdefault(name, (0, response.headers.get("ETag", "")))
                return b""
            self._check_status(url, name, response)
            total = self._check_version(url, name, response, offset)
            data = self._body(response)
            whole = True
        except HTTPError as error:
            raise TransientError(_reason(error)) from error
        finally:
            # A connection whose answer was not read to its end cannot serve another request.
            if not whole:
                response.close()
            response.release_conn()
        wanted = min(size, total - offset)
        if len(data) != wanted:
            raise TransientError(f"{len(data)} of {wanted} bytes came")
        return data

    def _check_status(self, url: str, name: str, response: Any) -> None:
        status = response.status
        if status in _TRANSIENT:
            raise TransientError(f"the server answers {status}", _retry_after_s(response))
        if status in (404, 410):
            raise missing(name)
        if status in (401, 403):
            raise StorageError(f"{url}: the server answers {status}: not allowed to read it; check the URL.")
        if status == 200:
            if response.headers.get("Content-Length") == "0":
                raise DataError(f"{url}: 0 bytes; copy it there again.")
            raise StorageError(f"{url}: the server ignores range requests; use one that answers them with 206.")
        if status != 206:
            raise StorageError(f"{url}: the server answers {status}; check the URL.")

    def _check_version(self, url: str, name: str, response: Any, offset: int) -> int:
        """Return the file's size; raises StorageError if this is not the file that was read before."""
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match["first"]) != offset:
            raise StorageError(f"{url}: the server sends another range than was asked for; use another server.")
        found = int(match["total"]), response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        with self._lock:
            known = self._pinned.setdefault(name, found)
        if known != found:
            raise StorageError(
                f"{url}: changed while it was read: {known[0]} bytes, {known[1]} became {found[0]} bytes, {found[1]}; "
                "leave shards in place while they are trained on, and start again."
            )
        return found[0]

    def _body(self, response: Any) -> bytes:
        """Return the body, unless it trickles in so slowly that another connection will be faster."""
        parts: list[bytes] = []
        num_bytes, started = 0, time.monotonic()
        for part in response.stream(_PIECE_BYTES):
            parts.append(part)
            num_bytes += len(part)
            taken_s = time.monotonic() - started
            if taken_s > self._timeout_s and num_bytes < self._min_bytes_per_s * taken_s:
                raise TransientError(f"only {num_bytes} bytes in {taken_s:.0f} s")
        return b"".join(parts)


def _retry_after_s(response: Any) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _reason(error: HTTPError) -> str:
    """Return the cause of a failed request without urllib3's object names."""
    cause = getattr(error, "reason", None) or error
    return str(cause).rpartition(": ")[2] or type(cause).__name__
