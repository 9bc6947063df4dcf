"""A helper process that answers one line for one line, and is started again after it crashed or hung."""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HUNG: Final = None
CRASHED: Final = b""
ALIVE: Final = b"."
"""A line that only says that the process is still at work, and starts the time limit anew."""


class LineWorker:
    """A process running `python -m MODULE`, started with the first request. Used by one thread at a time."""

    def __init__(
        self, module: str, *, timeout_s: float, arguments: Sequence[str] = (), fds: Sequence[int] = ()
    ) -> None:
        """Prepare.

        Args:
            module: what is run; it reads a line on stdin, writes one on stdout, and ends when stdin closes.
            timeout_s: seconds after which it counts as hanging.
            arguments: further command line arguments.
            fds: file descriptors that it inherits under their numbers.
        """
        self._module, self._timeout_s = module, timeout_s
        self._arguments, self._fds = tuple(arguments), tuple(fds)
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def ask(self, request: bytes) -> bytes | None:
        """Return the answer to a line; `CRASHED` if the process ended over it, `HUNG` if it took too long."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request + b"\n")
            process.stdin.flush()
            answer = self._read_answer(process.stdout.fileno())
        except BrokenPipeError:
            answer = CRASHED
        if not answer:
            self.close()
        return answer

    def _read_answer(self, fd: int) -> bytes | None:
        # Not select(), which knows no descriptor above 1023.
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLHUP)
        while True:
            line, end, rest = self._unread.partition(b"\n")
            if end:
                self._unread = rest
                if line != ALIVE:
                    return line + end
            elif not poll.poll(self._timeout_s * 1000):
                return HUNG
            elif data := os.read(fd, 1 << 16):
                self._unread += data
            else:
                return CRASHED

    def kill(self) -> None:
        """End the process while another thread waits for its answer, which then is `CRASHED`."""
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """End the process."""
        self._unread = b""
        if self._process is not None:
            self._process.kill()
            # Not communicate(): it would flush requests that nobody reads any more.
            with contextlib.suppress(BrokenPipeError):
                self._process.__exit__(None, None, None)
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        return subprocess.Popen(
            [sys.executable, "-m", self._module, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=self._fds,
            # Away from the terminal: Ctrl-C is for its owner, and must not look like a crash of the decoder.
            start_new_session=True,
            # Workers are many; a thread pool in each of them would only get in the others' way.
            env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
