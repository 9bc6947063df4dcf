"""A rank's side of its writer process, and the host memory that both share."""

import contextlib
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_dist.io import writer_process

logger = logging.getLogger(__name__)

# What the rest of the machine keeps when a snapshot is put beside a training job.
_RESERVE_BYTES = 1 << 30


class Slot:
    """A file's image in memory that the writer process can map; kept from save to save."""

    def __init__(self, size: int, *, pin: bool) -> None:
        """Reserve `size` bytes, page-locked with `pin`.

        A memory file, since /dev/shm is 64 MB in a default container.

        Raises:
            OSError: the memory is not there.
        """
        self.fd = os.memfd_create("wan-dist-snapshot", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, size)
            self._map = mmap.mmap(self.fd, size)
        except OSError:
            os.close(self.fd)
            raise
        self.size = size
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pinned = pin and self._pin()

    def _pin(self) -> bool:
        cudart: Any = torch.cuda.cudart()
        status = cudart.cudaHostRegister(self.tensor.data_ptr(), self.size, 0)
        if int(status) != 0:
            logger.warning("a snapshot buffer could not be page-locked (status %s); copies to it are slower", status)
            return False
        return True

    def close(self) -> None:
        """Give the memory back."""
        if self._pinned:
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(self.tensor.data_ptr())
        del self.tensor
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)


class Arena:
    """The slots of a rank, one per file of a checkpoint."""

    def __init__(self, *, pin: bool, local_ranks: int) -> None:
        """Begin with none.

        Args:
            pin: page-lock them (an accelerator is used).
            local_ranks: ranks of this machine, which reserve the same at the same time.
        """
        self._pin, self._local_ranks = pin, local_ranks
        self._slots: dict[str, Slot] = {}

    def take(self, name: str, size: int) -> Slot | None:
        """Return the slot of a file, at least `size` bytes; None if that would leave the machine too little memory."""
        slot = self._slots.get(name)
        if slot and slot.size >= size:
            return slot
        if slot:
            self._slots.pop(name).close()
        if size * self._local_ranks + _RESERVE_BYTES > available_bytes():
            return None
        try:
            # Files of the same name differ by a few bytes from save to save.
            self._slots[name] = Slot(max(size + size // 64, mmap.PAGESIZE), pin=self._pin)
        except OSError as error:
            logger.warning("no memory for a snapshot of %s (%s)", name, error)
            return None
        return self._slots[name]

    def close(self) -> None:
        """Give all memory back."""
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()


def available_bytes() -> int:
    """Return the host memory that can still be used, by the kernel's account and the container's limit."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=0)


class WriterProcess:
    """The process that writes this rank's files. It is an exec of its own, never a fork of a threaded process."""

    def __init__(self) -> None:
        """Start it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-I", "-S", str(writer_process.__file__), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._channel = ours
        self.progress_bytes = 0

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def write(self, path: Path, slot: Slot, size: int) -> None:
        """Have the first `size` bytes of a slot written to `path`; the slot must stay as it is until the answer.

        Raises:
            OSError: the process is gone.
        """
        socket.send_fds(self._channel, [json.dumps({"write": str(path), "bytes": size}).encode()], [slot.fd])

    def delete(self, folder: Path) -> None:
        """Have a folder deleted.

        Raises:
            OSError: the process is gone.
        """
        self._channel.send(json.dumps({"delete": str(folder)}).encode())

    def answers(self, *, wait_s: float) -> list[dict[str, Any]]:
        """Return the answers that came, waiting up to `wait_s` seconds for a first message.

        Raises:
            OSError: the process is gone.
        """
        found: list[dict[str, Any]] = []
        self._channel.settimeout(wait_s)
        while True:
            try:
                message = self._channel.recv(1 << 16)
            except (TimeoutError, BlockingIOError):
                return found
            finally:
                self._channel.settimeout(0)
            if not message:
                raise ConnectionError(f"the writer process {self.pid} ended, status {self._process.poll()}")
            answer = json.loads(message)
            if "progress" in answer:
                self.progress_bytes += answer["progress"]
            else:
                found.append(answer)

    def close(self) -> None:
        """End it; what it has not finished is lost."""
        self._channel.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
