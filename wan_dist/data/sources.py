"""Find clips and their captions, in whatever way they are kept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from wan_dist.core.errors import ConfigError, DataError
from wan_dist.data.captions import sidecar_captions
from wan_dist.data.probe import Reject
from wan_dist.data.source_concepts import CONCEPT_NAME, CONCEPTS_NAME, list_concepts
from wan_dist.data.source_files import CLIP_EXTENSIONS, Listing, Source, file_source, walk_clips
from wan_dist.data.source_tables import TABLE_SUFFIXES, list_lines, list_table
from wan_dist.data.source_tars import list_tars


def list_sources(source: Path, captions_path: Path | None = None, source_format: str = "auto") -> Listing:
    """Return the clips of a source with their captions, in order of their paths.

    Args:
        source: a folder, or a caption table, `concepts.json` or tar in one.
        captions_path: table of captions; paths in it are relative to `source`.
        source_format: a key of `FORMATS`, or `auto`.
    Raises:
        DataError: something is missing, or holds no clips.
        ConfigError: no such format.
    """
    if source_format not in (*FORMATS, "auto"):
        raise ConfigError(f"--format {source_format} is not known; use auto, {', '.join(FORMATS)}.")
    if not source.exists():
        raise DataError(f"{source}: there is no such folder; name the folder that holds the clips.")
    chosen = ("table" if captions_path else _recognise(source)) if source_format == "auto" else source_format
    listing = FORMATS[chosen](source, captions_path)
    if not listing.sources and not listing.rejects:
        raise DataError(f"{source}: no clips; clips are .{', .'.join(CLIP_EXTENSIONS)}. Put some there.")
    if all(r.code == "unknown_container" for r in listing.rejects) and not listing.sources:
        raise DataError(
            f"{source}: {len(listing.rejects)} files of other kinds; clips are .{', .'.join(CLIP_EXTENSIONS)}."
        )
    return replace(listing, rejects=tuple(sorted(listing.rejects, key=lambda r: (r.path, r.code, r.hint))))


def _recognise(source: Path) -> str:
    """Return the format of a file or folder."""
    if source.is_file():
        if source.suffix.lower() == ".tar":
            return "tars"
        return "concepts" if source.name == CONCEPTS_NAME else "table"
    if (source / CONCEPTS_NAME).is_file() or any(source.glob(f"*/{CONCEPT_NAME}")):
        return "concepts"
    if _tables(source):
        return "table"
    if all((source / name).is_file() for name in ("videos.txt", "prompts.txt")):
        return "lists"
    if any(source.glob("*.tar")) and not walk_clips(source)[0]:
        return "tars"
    return "sidecars"


def _tables(folder: Path) -> list[Path]:
    return [path for suffix in TABLE_SUFFIXES if (path := folder / f"metadata{suffix}").is_file()]


def _list_sidecars(source: Path, captions_path: Path | None) -> Listing:
    folder = _folder(source)
    files, rejects = walk_clips(folder, with_sidecars=True)
    sources: list[Source] = []
    for path in files:
        captions = sidecar_captions(folder, path)
        found = captions if isinstance(captions, Reject) else file_source(folder / path, path, captions)
        rejects.append(found) if isinstance(found, Reject) else sources.append(found)
    return Listing(tuple(sources), tuple(rejects), folder)


def _list_table(source: Path, captions_path: Path | None) -> Listing:
    if source.is_file() and captions_path is None:
        return list_table(source.parent, source)
    tables = [captions_path] if captions_path else _tables(source)
    if len(tables) != 1:
        found = ", ".join(path.name for path in tables) or f"no metadata{'|'.join(TABLE_SUFFIXES)}"
        raise DataError(f"{source}: {found}; name the caption table with --captions.")
    return list_table(_folder(source), tables[0])


def _list_lines(source: Path, captions_path: Path | None) -> Listing:
    return list_lines(_folder(source))


def _list_tars(source: Path, captions_path: Path | None) -> Listing:
    if source.is_file():
        return list_tars(source.parent, [source])
    return list_tars(source, sorted(source.rglob("*.tar")))


def _list_concepts(source: Path, captions_path: Path | None) -> Listing:
    if source.is_file():
        return list_concepts(source.parent, source)
    whole = source / CONCEPTS_NAME
    return list_concepts(source, whole if whole.is_file() else None)


def _folder(source: Path) -> Path:
    if not source.is_dir():
        raise DataError(f"{source}: is not a folder; name the folder that holds the clips.")
    return source


FORMATS: Final[dict[str, Callable[[Path, Path | None], Listing]]] = {
    "sidecars": _list_sidecars,
    "table": _list_table,
    "lists": _list_lines,
    "tars": _list_tars,
    "concepts": _list_concepts,
}
"""How clips and captions can be kept."""
