"""Check and cut clips in a process of their own, so that a crash or hang of a decoder costs one clip and not the run.

Run as `python -m wan_dist.data.probe_worker`: one JSON request per line on stdin, one JSON answer per line on stdout.
The process ends when its stdin closes, hence also when its owner is killed.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final, Self

from wan_dist.core.errors import DataError, WanDistError
from wan_dist.data.line_worker import ALIVE, LineWorker
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.prepare import Piece, Prepared, prepare_clip
from wan_dist.data.probe import ClipInfo, Reject
from wan_dist.data.spans import FileSpan

PROBE_TIMEOUT_S: Final = 60.0
"""Probing takes milliseconds, decoding a frame too; only a hang takes this long, even on a busy machine."""

_MEMORY_LIMIT_BYTES: Final = 8 << 30
_ALIVE_INTERVAL_S: Final = 1.0


class Prober:
    """A checking process that is started again after it crashed or hung. Use as a context manager, by one thread."""

    def __init__(self, timeout_s: float = PROBE_TIMEOUT_S, module: str = __name__) -> None:
        """Prepare; the process starts with the first clip.

        Args:
            timeout_s: seconds without a sign of life after which a clip counts as hanging the decoder.
            module: module that is run; another one in tests of crashes.
        """
        self._timeout_s = timeout_s
        self._worker = LineWorker(module, timeout_s=timeout_s)

    def probe(self, span: FileSpan, name: str) -> ClipInfo | Reject:
        """Return what a file holds, or why it cannot be used; never raises on a bad file.

        Args:
            span: the file, or a part of one.
            name: how a `Reject` names it.
        """
        prepared = self.prepare(span, name, ClipRules(), span.path.parent)
        return prepared.pieces[0].info if prepared.pieces else prepared.rejects[0]

    def prepare(self, span: FileSpan, name: str, rules: ClipRules, work_dir: Path) -> Prepared:
        """Return the clips that a file becomes under `rules`; never raises on a bad file.

        Args:
            span: the file.
            name: how a `Reject` names it.
            rules: what to do.
            work_dir: folder for encoded clips.
        Raises:
            DataError: the rules cannot be followed at all: the disk is full, or a package is missing.
        """
        place = [str(span.path), span.offset, span.size]
        request = json.dumps([place, name, rules.as_json(), str(work_dir)]).encode()
        # Once more before blaming the clip: the process may have been killed for another's memory.
        answer = self._worker.ask(request) or self._worker.ask(request)
        if answer:
            found = json.loads(answer)
            if "error" in found:
                raise DataError(found["error"])
            pieces = tuple(Piece.from_json(row) for row in found["pieces"])
            return Prepared(pieces, tuple(Reject(**row) for row in found["rejects"]))
        if answer is None:
            hint = f"no sign of life from its decoder for {self._timeout_s:g} s, twice; transcode it"
            return Prepared((), (Reject("probe_timeout", name, hint),))
        return Prepared((), (Reject("probe_crash", name, "reading it crashed the decoder, twice; transcode it"),))

    def close(self) -> None:
        """End the process."""
        self._worker.close()

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
        answers.write(json.dumps(_answer(line, _ticker(answers))).encode() + b"\n")
        answers.flush()


def _answer(line: bytes, tick: Callable[[], None]) -> dict[str, Any]:
    (path, offset, size), name, rules, work_dir = json.loads(line)
    try:
        return asdict(prepare_clip(FileSpan(Path(path), offset, size), name, ClipRules(**rules), Path(work_dir), tick))
    except WanDistError as error:
        return {"error": str(error)}


def _ticker(answers: IO[bytes]) -> Callable[[], None]:
    """Return a function that says, now and then, that the process is at work."""
    last_s = time.monotonic()

    def tick() -> None:
        nonlocal last_s
        if time.monotonic() - last_s > _ALIVE_INTERVAL_S:
            last_s = time.monotonic()
            answers.write(ALIVE + b"\n")
            answers.flush()

    return tick


if __name__ == "__main__":
    serve()
