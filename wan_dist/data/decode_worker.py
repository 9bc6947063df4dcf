"""Decode clips in processes of their own, so that a crash, a hang or a memory bomb costs one sample and not the run.

Run as `python -m wan_dist.data.decode_worker IN OUT`: one JSON request per line on stdin, one JSON answer per line on
stdout. The file and its frames travel through two shared memory files, IN and OUT, whose descriptors are inherited.
The process ends when its stdin closes, hence also when its owner is killed.
"""

import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.decode import decode_clip
from wan_dist.data.line_worker import CRASHED, LineWorker

DECODE_TIMEOUT_S: Final = 120.0
"""81 frames of 720p take under a second; only a hang takes this long, even on a busy machine."""

MEMORY_LIMIT_BYTES: Final = 8 << 30
"""Address space of a decoding process. Sixteen reference frames of the largest size allowed take about 2 GB."""

_MODULE: Final = "wan_dist.data.decode_worker"


@dataclass(frozen=True)
class Decoder:
    """Turns the bytes of clips into frames.

    Attributes:
        decode: as `wan_dist.data.decode.decode_clip`, with bytes as its source.
        close: ends its processes.
    """

    decode: Callable[..., NDArray[np.uint8]]
    close: Callable[[], None]


def open_decoder(
    kind: Literal["process", "thread"],
    *,
    timeout_s: float = DECODE_TIMEOUT_S,
    memory_bytes: int = MEMORY_LIMIT_BYTES,
    module: str = _MODULE,
) -> Decoder:
    """Return a decoder that many threads may use at once.

    Args:
        kind: thread decodes in the calling thread; process in one process per thread that calls.
        timeout_s: seconds after which a process counts as hanging on a clip.
        memory_bytes: address space of a process.
        module: module that is run; another one in tests of crashes.
    """
    if kind == "thread":
        return Decoder(decode_clip, lambda: None)
    pool = _Pool(timeout_s, memory_bytes, module)
    return Decoder(pool.decode, pool.close)


class _Pool:
    """Decoding processes, as many as were ever needed at once, and the clips that ended them."""

    def __init__(self, timeout_s: float, memory_bytes: int, module: str) -> None:
        self._limits = timeout_s, memory_bytes, module
        self._idle: list[_Process] = []
        self._busy: list[_Process] = []
        self._closed = False
        self._fatal: dict[str, str] = {}
        self._lock = threading.Lock()

    def decode(self, source: bytes, bucket: Bucket, *, name: str = "clip", **options: Any) -> NDArray[np.uint8]:
        if name in self._fatal:
            raise DataError(self._fatal[name])
        process = self._take()
        try:
            frames = process.decode(source, bucket, name, options)
            if isinstance(frames, str) and not self._closed:
                # Once more before blaming the clip: the process may have been killed for another's memory.
                frames = process.decode(source, bucket, name, options)
        finally:
            self._give_back(process)
        if isinstance(frames, str):
            # Not tried again in the next epoch: a hang would cost its time limit each time.
            self._fatal[name] = f"{name}: cannot be decoded: {frames}, twice; transcode it"
            raise DataError(self._fatal[name])
        return frames

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for process in self._idle:
                process.close()
            self._idle.clear()
            for process in self._busy:
                process.kill()

    def _take(self) -> "_Process":
        with self._lock:
            if self._closed:
                raise DataError("decoding has ended")
            process = self._idle.pop() if self._idle else _Process(*self._limits)
            self._busy.append(process)
            return process

    def _give_back(self, process: "_Process") -> None:
        with self._lock:
            self._busy.remove(process)
            if self._closed:
                process.close()
            else:
                self._idle.append(process)


class _Process:
    """One decoding process."""

    def __init__(self, timeout_s: float, memory_bytes: int, module: str) -> None:
        self._in, self._out = _shared_file("clip"), _shared_file("frames")
        self._timeout_s = timeout_s
        fds = self._in.fileno(), self._out.fileno()
        arguments = [*map(str, fds), str(memory_bytes), str(timeout_s)]
        self._worker = LineWorker(module, timeout_s=timeout_s, arguments=arguments, fds=fds)

    def decode(self, source: bytes, bucket: Bucket, name: str, options: dict[str, Any]) -> NDArray[np.uint8] | str:
        """Return the frames, or what happened to the process; raises DataError if the clip is at fault."""
        shape = (bucket.num_frames, bucket.height, bucket.width, 3)
        num_bytes = int(np.prod(shape))
        self._in.seek(0)
        self._in.truncate(0)
        self._in.write(source)
        self._in.flush()
        if os.fstat(self._out.fileno()).st_size < num_bytes:
            self._out.truncate(num_bytes)
        request = [bucket.width, bucket.height, bucket.num_frames, name, options]
        answer = self._worker.ask(json.dumps(request).encode())
        if not answer:
            return "it crashed the decoder" if answer == CRASHED else f"it took over {self._timeout_s:g} s"
        if error := json.loads(answer):
            raise DataError(error)
        with mmap.mmap(self._out.fileno(), num_bytes, prot=mmap.PROT_READ) as view:
            return np.frombuffer(view, np.uint8).reshape(shape).copy()

    def kill(self) -> None:
        self._worker.kill()

    def close(self) -> None:
        self._worker.close()
        self._in.close()
        self._out.close()


def _shared_file(name: str) -> Any:
    """Return a file in memory that has no name on any disk."""
    # Not /dev/shm, which containers cut down to 64 MB: writing past that ends the process.
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "w+b")
    return tempfile.TemporaryFile()  # lives as long as its process


def serve(in_fd: int, out_fd: int, memory_bytes: int, timeout_s: float) -> None:
    """Answer requests until stdin closes: `""` with the frames in the file OUT, or what is wrong with the clip."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    # A codec library that prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        # A hanging decoder does not see its stdin close, so an orphan would stay for ever.
        signal.alarm(int(2 * timeout_s) + 1)
        answers.write(json.dumps(_answer(in_fd, out_fd, line)).encode() + b"\n")
        answers.flush()
        signal.alarm(0)


def _answer(in_fd: int, out_fd: int, line: bytes) -> str:
    width, height, num_frames, name, options = json.loads(line)
    bucket = Bucket(width, height, num_frames)
    try:
        with open(in_fd, "rb", closefd=False) as stream:
            stream.seek(0)
            source = stream.read()
        view = mmap.mmap(out_fd, num_frames * height * width * 3)
        out = np.frombuffer(view, np.uint8).reshape(num_frames, height, width, 3)
        decode_clip(source, bucket, name=name, out=out, **options)
    except DataError as error:
        return str(error)
    except (MemoryError, OSError):  # the shared memory is mapped, and a map that does not fit is an OSError
        return f"{name}: cannot be decoded: it needs more memory than a decoding process has; scale it down"
    return ""


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
