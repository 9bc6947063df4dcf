"""OneTrainer-style concepts: folders with settings of their own, listed in one `concepts.json` or one file each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from wan_dist.core.errors import DataError
from wan_dist.data.captions import clean_captions, sidecar_captions
from wan_dist.data.index import ConceptEntry
from wan_dist.data.probe import Reject
from wan_dist.data.source_files import Listing, Source, file_source, walk_clips

CONCEPTS_NAME: Final = "concepts.json"
CONCEPT_NAME: Final = "concept.json"
PROMPT_SOURCES: Final = ("sample", "concept", "filename")


def list_concepts(folder: Path, concepts_path: Path | None) -> Listing:
    """Return the clips of all enabled concepts. Repeats and weights are noted, not carried out.

    Args:
        folder: folder that relative paths of concepts start at.
        concepts_path: list of concepts as OneTrainer saves it; None reads a `concept.json` in each subfolder.
    Raises:
        DataError: a file is no list of concepts, or names a folder that is missing.
    """
    settings = _listed(concepts_path) if concepts_path else _in_folders(folder)
    sources: list[Source] = []
    rejects: list[Reject] = []
    concepts: list[ConceptEntry] = []
    taken: set[str] = set()
    for where, concept in settings:
        if not concept.get("enabled", True):
            continue
        path = folder / _text(where, concept, "path")
        if not path.is_dir():
            raise DataError(
                f"{where}: path {concept['path']}: there is no such folder; correct it or disable the concept."
            )
        name = _unique(str(concept.get("name") or path.name), taken)
        found, left_out = _clips(folder, path, name, concept, where)
        sources += found
        rejects += left_out
        kind = str(concept.get("type", "STANDARD"))
        weight = _number(where, concept, "loss_weight")
        concepts.append(
            ConceptEntry(
                name=name,
                kind=kind,
                repeats=_repeats(where, concept, len(found)),
                loss_weight=weight,
                num_clips=len(found),
            )
        )
    return Listing(tuple(sorted(sources, key=lambda s: s.path)), tuple(rejects), folder, tuple(concepts))


def _clips(
    root: Path, folder: Path, name: str, concept: dict[str, Any], where: str
) -> tuple[list[Source], list[Reject]]:
    text = concept.get("text") or {}
    kind = text.get("prompt_source", "sample")
    if kind not in PROMPT_SOURCES:
        raise DataError(f"{where}: text.prompt_source is {kind!r}; use one of {', '.join(PROMPT_SOURCES)}.")
    shared = _lines(root / str(text.get("prompt_path", ""))) if kind == "concept" else None
    files, rejects = walk_clips(folder, bool(concept.get("include_subdirectories", False)))
    sources: list[Source] = []
    for path in files:
        captions = shared or (_from_name(path) if kind == "filename" else _beside(folder, path))
        found = captions if isinstance(captions, Reject) else file_source(folder / path, path, captions)
        if isinstance(found, Source):
            mask = _file(root, folder / found.mask) if found.mask else ""
            file = _file(root, folder / path)
            sources.append(replace(found, path=f"{name}/{path}", file=file, concept=name, mask=mask))
        else:
            rejects.append(found)
    return sources, [replace(r, path=f"{name}/{r.path}") for r in rejects]


def _beside(folder: Path, path: str) -> tuple[str, ...] | Reject:
    """Captions beside a clip; every line of a `.txt` is one, as OneTrainer reads it."""
    captions = sidecar_captions(folder, path)
    if isinstance(captions, Reject):
        return captions
    return tuple(line.strip() for caption in captions for line in caption.split("\n") if line.strip())


def _from_name(path: str) -> tuple[str, ...] | Reject:
    try:
        return clean_captions({"caption": Path(path).stem})
    except ValueError as error:
        return Reject("bad_caption", path, f"its file name: {error}")


def _lines(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
        return clean_captions({"captions": [line for line in lines if line.strip()]})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: a concept's prompts cannot be read from it: {error}") from error


def _file(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file.absolute())


def _listed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    content = _json(path)
    if not isinstance(content, list) or not all(isinstance(c, dict) for c in content):
        raise DataError(f'{path}: not a list of concepts; write [{{"name": ..., "path": ...}}, ...].')
    return [(f"{path.name}[{number}]", concept) for number, concept in enumerate(content)]


def _in_folders(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for path in sorted(folder.glob(f"*/{CONCEPT_NAME}")):
        content = _json(path)
        if not isinstance(content, dict):
            raise DataError(f"{path}: not a JSON object.")
        # It lies in its folder, which may be called otherwise by now.
        found.append((f"{path.parent.name}/{CONCEPT_NAME}", {**content, "path": path.parent.name}))
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error}); correct it.") from error


def _text(where: str, concept: dict[str, Any], key: str) -> str:
    value = concept.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: has no {key}; every concept needs one.")
    return value


def _number(where: str, concept: dict[str, Any], key: str) -> float:
    value = concept.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise DataError(f"{where}: {key} is {value!r}; write a number from 0.")
    return float(value)


def _repeats(where: str, concept: dict[str, Any], num_clips: int) -> float:
    balancing = _number(where, concept, "balancing")
    # SAMPLES asks for so many clips per epoch, REPEATS for so many passes.
    if concept.get("balancing_strategy") == "SAMPLES":
        return balancing / num_clips if num_clips else 0.0
    return balancing


def _unique(name: str, taken: set[str]) -> str:
    base, number = name.replace("/", "_"), 1
    unique = base
    while unique.casefold() in taken:
        number += 1
        unique = f"{base}-{number}"
    taken.add(unique.casefold())
    return unique
