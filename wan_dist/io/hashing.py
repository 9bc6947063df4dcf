"""Hashes and durable writes of files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 4 << 20


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as handle:
        buffer = bytearray(_CHUNK_BYTES)
        view = memoryview(buffer)
        while count := handle.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file's text so that a reader, or a crash, sees the old or the new one and never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    sync(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace a JSON file as `write_text_atomic` does."""
    write_text_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
