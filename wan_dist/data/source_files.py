"""What every kind of source is listed as, and the clips in a folder."""

import os
import stat as stat_kind
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from wan_dist.data.index import ConceptEntry
from wan_dist.data.masks import clip_of_mask, mask_beside
from wan_dist.data.probe import Reject

CLIP_EXTENSIONS: Final = ("mp4", "mov", "m4v", "mkv", "webm", "avi", "ts", "mts", "m2ts", "png", "jpg", "jpeg", "webp")
"""Files with these extensions are clips. Images are clips of one frame."""

FOREIGN_EXTENSIONS: Final = (
    *("mpg", "mpeg", "flv", "wmv", "asf", "3gp", "ogv", "mxf", "vob", "f4v", "m3u8", "gif"),
    *("bmp", "tif", "tiff", "heic", "avif", "jxl"),
)
"""Videos and images that are not accepted, and are reported so that nobody wonders where they went."""

NOT_CAPTIONS: Final = frozenset({"readme", "license", "licence", "requirements"})
"""Texts that lie in folders of clips for other reasons."""


@dataclass(frozen=True)
class Source:
    """One clip with its captions.

    Attributes:
        path: unique name with `/`; where `file` is empty, also the path relative to the source folder.
        num_bytes: size of the clip, bytes.
        mtime_ns: time of its file's last change, nanoseconds.
        captions: at least one, none empty.
        file: file that holds the clip, relative to the source folder or absolute.
        offset: where the clip starts in that file, bytes; 0 where it is the file.
        concept: name of the concept that it belongs to, or empty.
        mask: name of its mask; where `mask_file` is empty, the file, relative to the source folder or absolute. Empty
            without a mask.
        mask_bytes: size of the mask, bytes.
        mask_mtime_ns: time of the last change of the mask's file, nanoseconds.
        mask_file: file that holds the mask.
        mask_offset: where the mask starts in that file, bytes.
    """

    path: str
    num_bytes: int
    mtime_ns: int
    captions: tuple[str, ...]
    file: str = ""
    offset: int = 0
    concept: str = ""
    mask: str = ""
    mask_bytes: int = 0
    mask_mtime_ns: int = 0
    mask_file: str = ""
    mask_offset: int = 0


@dataclass(frozen=True)
class Listing:
    """What a source holds.

    Attributes:
        sources: clips in order of their paths.
        rejects: what is left out already.
        root: folder that paths are relative to.
        concepts: concepts, where the source has them.
    """

    sources: tuple[Source, ...]
    rejects: tuple[Reject, ...]
    root: Path
    concepts: tuple[ConceptEntry, ...] = ()


def walk_clips(folder: Path, subfolders: bool = True, *, with_sidecars: bool = False) -> tuple[list[str], list[Reject]]:
    """Return all clips, sorted, and files that a user could take for clips. Links to folders are not followed.

    Args:
        folder: where to look; returned paths are relative to it, with `/`.
        subfolders: look in folders inside it too; those whose names start with a dot never count.
        with_sidecars: report texts without a clip beside them: the clip may have got lost.
    """
    files: list[str] = []
    rejects: list[Reject] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if subfolders else []
        beside = {name.lower() for name in names}
        # Names without extension that a text may have.
        stems = {name.rpartition(".")[0] for name in beside if _extension(name) in CLIP_EXTENSIONS + FOREIGN_EXTENSIONS}
        stems |= NOT_CAPTIONS
        for name in names:
            path = (Path(root) / name).relative_to(folder).as_posix()
            if (stem := clip_of_mask(name)) is not None:
                if not any(f"{stem.lower()}.{extension}" in beside for extension in CLIP_EXTENSIONS):
                    hint = f"no clip {_shown(stem)} beside it; rename the mask or the clip"
                    rejects.append(Reject("lone_mask", _shown(path), hint))
                continue
            extension = _extension(name)
            if name.startswith("."):
                continue
            if extension in FOREIGN_EXTENSIONS:
                rejects.append(Reject("unknown_container", _shown(path), f".{extension} is not read; transcode to mp4"))
            elif extension in CLIP_EXTENSIONS and is_utf8(path):
                files.append(path)
            elif extension in CLIP_EXTENSIONS:
                rejects.append(Reject("bad_name", repr(path), "the file name is not UTF-8; rename it"))
            elif with_sidecars and extension == "txt" and name[:-4].lower() not in stems:
                rejects.append(Reject("lone_caption", _shown(path), "no clip of its name beside it; was it lost?"))
    return sorted(files), rejects


def _shown(path: str) -> str:
    return path if is_utf8(path) else repr(path)


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; names of files that are not hold surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def file_source(file: Path, path: str, captions: tuple[str, ...]) -> Source | Reject:
    """Return the source of a file of its own, or why it cannot be read."""
    try:
        stat = file.stat()
    except OSError as error:
        return Reject("unreadable", path, f"{error.strerror}; check the file or the link")
    if not stat_kind.S_ISREG(stat.st_mode):
        # Opening a pipe waits for whoever writes into it.
        return Reject("unreadable", path, "not a regular file; remove it or copy its content into one")
    mask = mask_beside(file)
    if mask is None:
        return Source(path, stat.st_size, stat.st_mtime_ns, captions)
    about = mask.stat()
    return Source(
        path,
        stat.st_size,
        stat.st_mtime_ns,
        captions,
        mask=Path(path).with_name(mask.name).as_posix(),
        mask_bytes=about.st_size,
        mask_mtime_ns=about.st_mtime_ns,
    )
