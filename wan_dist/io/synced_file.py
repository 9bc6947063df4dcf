"""One file that is written, synced, hashed and read back while training waits."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from wan_dist.core.hashing import sha256_of
from wan_dist.io.file_image import FileImage


class HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Hash bytes and write them; return their number."""
        self.digest.update(data)
        return self._handle.write(data)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._handle.flush()


def write_synced(path: Path, write: Callable[[Any], None]) -> dict[str, Any]:
    """Write, sync and read back one file; return its size and hash.

    Raises:
        OSError: the disk is full or broken.
    """
    with path.open("wb") as handle:
        out = HashingFile(handle)
        write(out)
        handle.flush()
        os.fsync(handle.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    written = out.digest.hexdigest()
    if sha256_of(path) != written:
        raise OSError(f"{path} reads back differently from what was written")
    return {"bytes": path.stat().st_size, "sha256": written}


def write_image(image: FileImage, out: Any) -> None:
    """Write all bytes of an image to an open file."""
    content = torch.empty(image.size, dtype=torch.uint8)
    image.copy_to(content)
    out.write(content.numpy().data)
