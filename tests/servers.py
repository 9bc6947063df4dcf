"""A web server for tests that answers range requests, and fails on demand."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

Fault = Callable[["RangeHandler"], bool]
"""Answers a request in its own way and returns True, or returns False to let the server answer."""


@dataclass
class RangeServer:
    """A running server: where it listens, what it was asked, and the faults of the next requests, first first."""

    url: str
    folder: Path
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    etags: dict[str, str] = field(default_factory=dict)


class RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: RangeServer

    def do_GET(self) -> None:
        state = self.state
        name = unquote(self.path).lstrip("/")
        state.requests.append(f"{name} {self.headers.get('Range')}")
        if state.faults and state.faults.pop(0)(self):
            return
        path = state.folder / name
        if not path.is_file():
            self.answer(404, b"")
            return
        content = path.read_bytes()
        first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[first : last + 1]
        span = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
        self.answer(206, body, {"Content-Range": span, "ETag": state.etags.get(name, f'"{name}"')})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, *, send: int | None = None
    ) -> None:
        """Answer; with `send`, only so many bytes of the body that was announced, and hang up."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:send])
        if send is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder on a free port of this machine."""
    handler = type("Handler", (RangeHandler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state = RangeServer(f"http://127.0.0.1:{server.server_address[1]}", folder)
    handler.state = state
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def status(code: int, **headers: str) -> Fault:
    """Answer with a status and no body."""

    def fault(handler: RangeHandler) -> bool:
        handler.answer(code, b"", {key.replace("_", "-"): value for key, value in headers.items()})
        return True

    return fault


def cut(handler: RangeHandler) -> bool:
    """Announce a range and hang up in the middle of it."""
    content = (handler.state.folder / unquote(handler.path).lstrip("/")).read_bytes()
    first, last = (int(part) for part in handler.headers["Range"].removeprefix("bytes=").split("-"))
    body = content[first : last + 1]
    span = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
    handler.answer(206, body, {"Content-Range": span, "ETag": f'"{handler.path[1:]}"'}, send=len(body) // 2)
    return True


def reset(handler: RangeHandler) -> bool:
    """Hang up without a word."""
    handler.close_connection = True
    return True


def stall(seconds: float) -> Fault:
    """Say nothing for some time, then hang up."""

    def fault(handler: RangeHandler) -> bool:
        time.sleep(seconds)
        handler.close_connection = True
        return True

    return fault
