"""Durable writes of files."""

import json
import os
from pathlib import Path
from typing import Any


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
