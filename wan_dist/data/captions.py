"""Captions: find them in rows and sidecar files, and refuse what is no text."""

import json
from pathlib import Path
from typing import Any, Final

from wan_dist.data.probe import Reject
from wan_dist.data.source_files import is_utf8

CAPTION_KEYS: Final = ("captions", "caption", "text", "prompt")


def clean_captions(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the captions of a JSON object, stripped; raise ValueError with what is wrong with them."""
    value = next((row[key] for key in CAPTION_KEYS if row.get(key) is not None), None)
    if value is None:
        raise ValueError(f"has no caption; use one of the keys {', '.join(CAPTION_KEYS)}")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) for v in values):
        raise ValueError("its caption is neither text nor a list of texts")
    captions = tuple(v.strip() for v in values)
    if not captions or not all(captions):
        raise ValueError("its caption is empty; write one or remove it")
    if any("\0" in c or not is_utf8(c) for c in captions):
        raise ValueError("its caption holds NUL or broken characters; write it again as UTF-8 text")
    return captions


def parse_sidecar(content: bytes, is_json: bool) -> tuple[str, ...]:
    """Return the captions in a `.txt` or `.json`; raise ValueError with what is wrong.

    A byte order mark is dropped.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not is_json:
        return clean_captions({"caption": text})
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); correct it") from None
    if not isinstance(row, dict):
        raise ValueError('is not a JSON object; write {"caption": "..."}')
    return clean_captions(row)


def sidecar_captions(folder: Path, path: str) -> tuple[str, ...] | Reject:
    """Return the captions in the `.txt`, else the `.json`, beside a clip."""
    for suffix in (".txt", ".json"):
        sidecar = (folder / path).with_suffix(suffix)
        try:
            return parse_sidecar(sidecar.read_bytes(), suffix == ".json")
        except FileNotFoundError:
            continue
        except ValueError as error:
            return Reject("bad_caption", path, f"{sidecar.name}: {error}")
        except OSError as error:
            return Reject("bad_caption", path, f"{sidecar.name}: {error.strerror}; check the file")
    return Reject("no_caption", path, "write its caption to a .txt of the same name, or pass --captions FILE")
