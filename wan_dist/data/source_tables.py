"""Clips whose captions come from a table: CSV, JSON, JSON lines or Parquet, or from two lists of lines."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from wan_dist.core.errors import ConfigError, DataError
from wan_dist.data.captions import CAPTION_KEYS, clean_captions
from wan_dist.data.probe import Reject
from wan_dist.data.source_files import Listing, Source, file_source, walk_clips

FILE_KEYS: Final = ("file", "video", "video_path", "path", "file_name", "image", "image_path")
TABLE_SUFFIXES: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_MAX_FIELD_CHARACTERS: Final = 1 << 24
"""Of one field of a CSV. Python's own limit of 131072 would end the pack for one caption that is only too long; a quote
that is never closed still ends at this one."""

Row = tuple[str, dict[str, Any] | str]
"""Where a row stands, and the row or what is wrong with it."""


def list_table(folder: Path, table: Path) -> Listing:
    """Return the clips of `folder` with the captions that `table` gives them.

    Args:
        folder: where clips lie; relative paths in the table start there.
        table: one row per caption, with a file (one of `FILE_KEYS`) and one or more captions.
    Raises:
        DataError: the table is missing or is no table.
    """
    reader = _READERS.get(table.suffix.lower())
    if reader is None:
        raise DataError(f"{table}: tables of captions are {', '.join(TABLE_SUFFIXES)}; name one of those.")
    return _join(folder, reader(table))


def list_lines(folder: Path) -> Listing:
    """Return the clips of `folder`/videos.txt with the captions of `folder`/prompts.txt, line by line.

    Raises:
        DataError: the two files have different numbers of lines.
    """
    videos, prompts = ((_read_text(folder / name)).rstrip().split("\n") for name in ("videos.txt", "prompts.txt"))
    if len(videos) != len(prompts):
        raise DataError(f"{folder}: videos.txt has {len(videos)} lines, prompts.txt {len(prompts)}; make them agree.")
    pairs = enumerate(zip(videos, prompts, strict=True), 1)
    return _join(folder, ((f"videos.txt:{n}", {"file": v.strip(), "caption": p}) for n, (v, p) in pairs if v.strip()))


def _join(folder: Path, rows: Iterator[Row]) -> Listing:
    """Bring rows and files together, and report what is left on either side."""
    files, rejects = walk_clips(folder)
    captions: dict[str, tuple[str, ...]] = {}
    known = set(files)
    alike = {_loosely(path): path for path in files}
    for where, row in rows:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            path, texts = _row_path(row, folder), clean_captions(row)
        except ValueError as error:
            rejects.append(Reject("bad_row", where, str(error)))
            continue
        if path in known:
            captions[path] = captions.get(path, ()) + texts
        else:
            rejects.append(Reject("row_without_file", where, _why_no_file(folder, path, alike)))
    sources: list[Source] = []
    for path in files:
        found = (
            file_source(folder / path, path, captions[path])
            if path in captions
            else Reject("no_caption", path, "no good row of the caption table names it; add one")
        )
        rejects.append(found) if isinstance(found, Reject) else sources.append(found)
    return Listing(tuple(sources), tuple(rejects), folder)


def _row_path(row: dict[str, Any], folder: Path) -> str:
    path = next((row[key] for key in FILE_KEYS if row.get(key)), None)
    if not isinstance(path, str) or "\0" in path:
        raise ValueError(f"names no file; use one of the keys {', '.join(FILE_KEYS)}")
    return os.path.normpath(os.path.relpath(path, folder.absolute()) if Path(path).is_absolute() else path)


def _why_no_file(folder: Path, path: str, alike: dict[str, str]) -> str:
    if other := alike.get(_loosely(path)):
        return f"the row says {path}, the file is {other}; make letters, case and accents agree"
    if path.startswith("..") and (folder / path).exists():
        return f"{path} lies outside {folder.name}; give the folder that holds all clips as SRC"
    return f"there is no clip {path} in {folder.name}; correct it"


def _loosely(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; --captions names a table of captions.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8.") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines(): captions may hold U+2028 and the like.
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield f"{path.name}:{number}", row if isinstance(row, dict) else "not a JSON object; one object per line"


def _read_json(path: Path) -> Iterator[Row]:
    """Rows of a list of objects, or of an object from file to caption, captions or row."""
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); correct it.") from error
    if isinstance(content, dict):
        content = [{"file": k, **(v if isinstance(v, dict) else {"caption": v})} for k, v in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{path}: neither a list of objects nor an object from file to caption.")
    for number, row in enumerate(content):
        yield f"{path.name}[{number}]", row if isinstance(row, dict) else "not a JSON object"


def _read_csv(path: Path) -> Iterator[Row]:
    # The whole process's, hence never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_CHARACTERS))
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), dialect=_dialect(path))
    try:
        for row in reader:
            where = f"{path.name}:{reader.line_num}"
            # None is the key of columns that the header does not name.
            yield where, "has more columns than the header; quote texts with commas" if None in row else row
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: {error}; write it again as CSV.") from error


def _dialect(path: Path) -> type[csv.Dialect]:
    return csv.excel_tab if path.suffix.lower() == ".tsv" else csv.excel


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{path}: Parquet needs pyarrow ({error}): pip install 'wan_dist[parquet]'.") from error
    try:
        table = parquet.ParquetFile(path)
        wanted = [name for name in table.schema_arrow.names if name in (*FILE_KEYS, *CAPTION_KEYS)]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                yield f"{path.name}[{number}]", row
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not readable as Parquet ({error}).") from error


_READERS: Final[dict[str, Callable[[Path], Iterator[Row]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
