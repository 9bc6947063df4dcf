"""Find clips and their captions in a folder."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wan_dist.core.errors import DataError
from wan_dist.data.probe import Reject

CLIP_EXTENSIONS: Final = ("mp4", "mov", "m4v", "mkv", "webm", "avi", "png", "jpg", "jpeg")
"""Files with these extensions are clips. Images are clips of one frame."""

FOREIGN_EXTENSIONS: Final = ("ts", "mts", "m2ts", "mpg", "mpeg", "flv", "wmv", "gif", "webp")
"""Videos and images that are not accepted, and are reported so that nobody wonders where they went."""

FILE_KEYS: Final = ("file", "video", "path", "file_name")
CAPTION_KEYS: Final = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Source:
    """One clip with its captions.

    Attributes:
        path: relative to the source folder, with `/`.
        num_bytes: size of the file, bytes.
        mtime_ns: time of its last change, nanoseconds.
        captions: at least one, none empty.
    """

    path: str
    num_bytes: int
    mtime_ns: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """Clips in order of their paths, and what is left out already."""

    sources: tuple[Source, ...]
    rejects: tuple[Reject, ...]


def list_sources(folder: Path, captions_path: Path | None = None) -> Listing:
    """Return the clips of `folder` and its subfolders with their captions.

    Captions come from `captions_path` if given, else from a `.txt` (one caption) or `.json` file beside each clip.

    Args:
        folder: where clips lie.
        captions_path: JSON lines with a file (`file`, `video`, `path` or `file_name`, relative to `folder`) and a
            caption (`caption`, `text` or `prompt`, a string or a list of strings).
    Raises:
        DataError: the folder or the caption file is missing, or the folder holds no clips.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; name the folder that holds the clips.")
    files, rejects = _walk(folder)
    if not files:
        found = f"{len(rejects)} files of other kinds" if rejects else "no clips"
        raise DataError(f"{folder}: {found}; clips are .{', .'.join(CLIP_EXTENSIONS)}. Put some there.")
    rows: dict[str, tuple[str, ...]] | None = None
    if captions_path is not None:
        rows, row_rejects = _read_rows(captions_path, folder, files)
        rejects += row_rejects
    sources: list[Source] = []
    for path in files:
        captions = _row_captions(path, rows) if rows is not None else _sidecar_captions(folder, path)
        if isinstance(captions, Reject):
            rejects.append(captions)
            continue
        try:
            stat = (folder / path).stat()
        except OSError as error:
            rejects.append(Reject("unreadable", path, f"{error.strerror}; check the file or the link"))
            continue
        sources.append(Source(path, stat.st_size, stat.st_mtime_ns, captions))
    return Listing(tuple(sources), tuple(sorted(rejects, key=lambda r: (r.path, r.code, r.hint))))


def _walk(folder: Path) -> tuple[list[str], list[Reject]]:
    """Return all clips, sorted, and files that a user could take for clips. Links to folders are not followed."""
    files: list[str] = []
    rejects: list[Reject] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in names:
            path = (Path(root) / name).relative_to(folder).as_posix()
            extension = name.rpartition(".")[2].lower()
            if name.startswith(".") or extension not in CLIP_EXTENSIONS + FOREIGN_EXTENSIONS:
                continue
            if extension in FOREIGN_EXTENSIONS:
                rejects.append(Reject("unknown_container", path, f".{extension} is not read; transcode to mp4"))
            elif not _is_utf8(path):
                rejects.append(Reject("bad_name", repr(path), "the file name is not UTF-8; rename it"))
            else:
                files.append(path)
    return sorted(files), rejects


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_rows(captions_path: Path, folder: Path, files: list[str]) -> tuple[dict[str, tuple[str, ...]], list[Reject]]:
    """Return the captions of each file, in the order of the rows, and the rows that belong to none."""
    known = set(files)
    by_lower = {path.lower(): path for path in files}
    rows: dict[str, tuple[str, ...]] = {}
    rejects: list[Reject] = []
    for number, line in _lines(captions_path):
        where = f"{captions_path.name}:{number}"
        try:
            path, captions = _parse_row(line)
        except ValueError as error:
            rejects.append(Reject("bad_row", where, str(error)))
            continue
        path = os.path.normpath(os.path.relpath(path, folder.absolute()) if Path(path).is_absolute() else path)
        if path in known:
            rows[path] = rows.get(path, ()) + captions
        elif path.lower() in by_lower:
            hint = f"the row says {path}, the file is {by_lower[path.lower()]}; make the letters' case agree"
            rejects.append(Reject("row_without_file", where, hint))
        else:
            rejects.append(Reject("row_without_file", where, f"there is no clip {path} in {folder.name}; correct it"))
    return rows, rejects


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; --captions names a JSON lines file.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from error
    # Not splitlines(): captions may hold U+2028 and the like.
    return ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _parse_row(line: str) -> tuple[str, tuple[str, ...]]:
    """Return file and captions of a row, or raise ValueError with what is wrong."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object; write one object per line") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object; write one object per line")
    path = next((row[key] for key in FILE_KEYS if key in row), None)
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"names no file; use one of the keys {', '.join(FILE_KEYS)}")
    return path, clean_captions(row)


def clean_captions(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the captions of a JSON object, stripped; raise ValueError with what is wrong with them."""
    value = next((row[key] for key in CAPTION_KEYS if key in row), None)
    if value is None:
        raise ValueError(f"has no caption; use one of the keys {', '.join(CAPTION_KEYS)}")
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) for v in values):
        raise ValueError("its caption is neither text nor a list of texts")
    captions = tuple(v.strip() for v in values)
    if not captions or not all(captions):
        raise ValueError("its caption is empty; write one or remove it")
    if any("\0" in c or not _is_utf8(c) for c in captions):
        raise ValueError("its caption holds NUL or broken characters; write it again as UTF-8 text")
    return captions


def _row_captions(path: str, rows: dict[str, tuple[str, ...]]) -> tuple[str, ...] | Reject:
    return rows.get(path) or Reject("no_caption", path, "no good row in the caption file names it; add one")


def _sidecar_captions(folder: Path, path: str) -> tuple[str, ...] | Reject:
    """Return the captions in the `.txt`, else the `.json`, beside a clip."""
    for suffix in (".txt", ".json"):
        sidecar = (folder / path).with_suffix(suffix)
        try:
            text = sidecar.read_bytes().decode("utf-8-sig")
            row = {"caption": text} if suffix == ".txt" else json.loads(text)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            return clean_captions(row)
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            return Reject("bad_caption", path, f"{sidecar.name} is not UTF-8; save it as UTF-8")
        except (ValueError, RecursionError) as error:
            return Reject("bad_caption", path, f"{sidecar.name}: {error}")
        except OSError as error:
            return Reject("bad_caption", path, f"{sidecar.name}: {error.strerror}")
    return Reject("no_caption", path, "write its caption to a .txt of the same name, or pass --captions FILE.jsonl")
