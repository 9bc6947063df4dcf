"""The program of the process that writes a rank's checkpoint files while training goes on.

Runs as a plain file under `python -I -S`: it knows only the standard library, starts in milliseconds and can be
killed at any time, which costs the save under way and nothing else. It reads commands from a Unix socket:

    {"write": PATH, "bytes": N} with the descriptor of a memory file -> {"file": PATH, "bytes": N, "sha256": HEX}
    {"delete": PATH}                                                   -> {"file": PATH}

and answers {"file": PATH, "error": TEXT} where something fails, {"progress": N} from time to time.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator

CHUNK_BYTES = 8 << 20
_PROGRESS_BYTES = 64 << 20


class ParentGoneError(Exception):
    """The rank died: what it had begun can never be committed."""


def write_file(path: str, fd: int, size: int, progress: "Progress") -> str:
    """Write the first `size` bytes of a memory file, sync and read them back; return their SHA-256 in hex.

    Raises:
        OSError: the disk is full or broken, or what was read back differs.
    """
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as out:  # noqa: PTH123 - pathlib costs 10 ms at start
        for chunk in _chunks(fd, size):
            written = 0
            while written < len(chunk):
                written += out.write(chunk[written:])
            digest.update(chunk)
            progress.add(len(chunk))
        os.fsync(out.fileno())
        # What is read back shall come from the disk, not from memory.
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(path, "rb") as handle:  # noqa: PTH123
        for chunk in _chunks(fd, size):
            # As bytes, which compare many times as fast as a digest is computed; a memoryview compares one by one.
            if handle.read(len(chunk)) != bytes(chunk):
                raise OSError(f"{path} reads back differently from what was written")
            progress.add(len(chunk))
    return digest.hexdigest()


def _chunks(fd: int, size: int) -> Iterator[memoryview]:
    """Yield views of a memory file's first `size` bytes; each is gone when the next is asked for."""
    if not size:
        return
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        for start in range(0, size, CHUNK_BYTES):
            with view[start : start + CHUNK_BYTES] as chunk:
                yield chunk


class Progress:
    """Tells the rank how far it is, and notices when that is gone."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._parent, self._pending = channel, os.getppid(), 0

    def add(self, count: int) -> None:
        """Count bytes that were written or read back."""
        if os.getppid() != self._parent:
            raise ParentGoneError
        self._pending += count
        if self._pending >= _PROGRESS_BYTES:
            # The rank reads at its step boundaries only; a full socket must not hold up the disk.
            with contextlib.suppress(BlockingIOError):
                self._channel.send(json.dumps({"progress": self._pending}).encode(), socket.MSG_DONTWAIT)
                self._pending = 0


def _answer(command: dict[str, object], fd: int | None, progress: Progress) -> dict[str, object]:
    path = str(command.get("write") or command.get("delete"))
    try:
        if "delete" in command:
            shutil.rmtree(path)
            return {"file": path}
        size = int(str(command["bytes"]))
        assert fd is not None
        return {"file": path, "bytes": size, "sha256": write_file(path, fd, size, progress)}
    except OSError as error:
        return {"file": path, "error": str(error)}


def main(channel_fd: int) -> None:
    """Serve commands until the other end of the socket is closed."""
    # Launchers signal whole groups; whether a save goes on is for the rank to decide.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    # Training comes first: the writer gets what the ranks leave of the processors, and a rank that wakes interrupts it.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    channel = socket.socket(fileno=channel_fd)
    progress = Progress(channel)
    with contextlib.suppress(ParentGoneError, ConnectionError):
        while True:
            message, fds, _, _ = socket.recv_fds(channel, 1 << 16, 1)
            if not message:
                return
            answer = _answer(json.loads(message), fds[0] if fds else None, progress)
            for fd in fds:
                os.close(fd)
            channel.send(json.dumps(answer).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]))
