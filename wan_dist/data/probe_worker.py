"""Probe clips in a process of their own, so that a crash or hang of a decoder costs one clip and not the run.

Run as `python -m wan_dist.data.probe_worker`: one JSON request per line on stdin, one JSON answer per line on stdout.
The process ends when its stdin closes, hence also when its owner is killed.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final, Self

from wan_dist.data.probe import ClipInfo, Reject, probe_clip

PROBE_TIMEOUT_S: Final = 60.0
"""Probing takes milliseconds; only a hang takes this long, even on a busy machine."""

_MEMORY_LIMIT_BYTES: Final = 8 << 30


class Prober:
    """A probing process that is started again after it crashed or hung. Use as a context manager, by one thread."""

    def __init__(self, timeout_s: float = PROBE_TIMEOUT_S, module: str = __name__) -> None:
        """Prepare; the process starts with the first clip.

        Args:
            timeout_s: seconds after which a clip counts as hanging the decoder.
            module: module that is run; another one in tests of crashes.
        """
        self._timeout_s = timeout_s
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    def probe(self, path: Path, name: str) -> ClipInfo | Reject:
        """Return what the file holds, or why it cannot be used; never raises on a bad file.

        Args:
            path: the file.
            name: how a `Reject` names it.
        """
        # Once more before blaming the clip: the process may have been killed for another's memory.
        answer = self._ask(path, name) or self._ask(path, name)
        if answer:
            kind, fields = json.loads(answer)
            return ClipInfo(**fields) if kind == "info" else Reject(**fields)
        if answer is None:
            return Reject("probe_timeout", name, f"reading it took over {self._timeout_s:g} s, twice; transcode it")
        return Reject("probe_crash", name, "reading it crashed the decoder, twice; transcode it")

    def _ask(self, path: Path, name: str) -> bytes | None:
        """Return the answer for a file, b"" if the process ended over it, or None if it took too long."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([str(path), name]).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], self._timeout_s)
            answer = process.stdout.readline() if ready else None
        except BrokenPipeError:
            answer = b""
        if not answer:
            self.close()
        return answer

    def close(self) -> None:
        """End the process."""
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
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Away from the terminal: Ctrl-C ends the packer, and must not look like a clip that crashed the decoder.
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": search_path},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve() -> None:
    """Answer requests until stdin closes."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT_BYTES, _MEMORY_LIMIT_BYTES))
    # A codec library that prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        path, name = json.loads(line)
        result = probe_clip(Path(path), name)
        kind = "info" if isinstance(result, ClipInfo) else "reject"
        answers.write(json.dumps([kind, asdict(result)]).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    serve()
