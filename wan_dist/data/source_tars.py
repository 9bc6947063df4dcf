"""Clips in existing WebDataset tars, such as video2dataset writes. Bytes stay where they are until they are packed."""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from wan_dist.data.captions import parse_sidecar
from wan_dist.data.masks import clip_of_mask
from wan_dist.data.probe import Reject
from wan_dist.data.source_files import CLIP_EXTENSIONS, FOREIGN_EXTENSIONS, Listing, Source, is_utf8
from wan_dist.data.tar_walk import RENAME, split_name


def list_tars(folder: Path, tars: list[Path]) -> Listing:
    """Return the clips in `tars`. Captions are their `.json` members (as in sidecar files) or else `.txt`.

    Members of a sample share the name up to the first dot and follow each other, as for `webdataset`.

    Args:
        folder: folder that the names of clips are relative to.
        tars: uncompressed tar files in it.
    """
    sources: list[Source] = []
    rejects: list[Reject] = []
    for tar in sorted(tars):
        name = tar.relative_to(folder).as_posix()
        try:
            for found in _samples(tar, name):
                rejects.append(found) if isinstance(found, Reject) else sources.append(found)
        except (tarfile.TarError, OSError) as error:
            hint = f"{error}; what comes before is used; copy the tar again (.tar.gz must be unpacked first)"
            rejects.append(Reject("bad_tar", name, hint))
    counts = Counter(_key(source.path) for source in sources)
    # Nobody can say which of them is meant.
    repeated = sorted({source.path for source in sources if counts[_key(source.path)] > 1})
    rejects += [Reject("repeated_key", path, f"several samples of the tar have its key; {RENAME}") for path in repeated]
    return Listing(tuple(s for s in sources if counts[_key(s.path)] == 1), tuple(rejects), folder)


def _samples(tar: Path, name: str) -> Iterator[Source | Reject]:
    stat = tar.stat()
    with tarfile.open(tar, "r:") as archive:
        members: list[tarfile.TarInfo] = []
        while (member := archive.next()) is not None:
            if member.offset_data + member.size > stat.st_size:
                raise CutTarError(f"{member.name} is cut off")
            if not member.isreg() or member.name.rpartition("/")[2].startswith(("__", ".")):
                continue
            if members and _key(member.name) != _key(members[0].name):
                yield from _sample(archive, members, name, stat.st_mtime_ns)
                members = []
            members.append(member)
        if members:
            yield from _sample(archive, members, name, stat.st_mtime_ns)
        if archive.offset + 2 * tarfile.BLOCKSIZE > stat.st_size:
            raise CutTarError("has no end mark; it may be cut off")


class CutTarError(tarfile.TarError):
    """The tar is shorter than it says."""


def _sample(
    archive: tarfile.TarFile, members: list[tarfile.TarInfo], name: str, mtime_ns: int
) -> Iterator[Source | Reject]:
    """Yield the clip of a group of members, if it has any."""
    media = [m for m in members if _extension(m) in CLIP_EXTENSIONS + FOREIGN_EXTENSIONS]
    masks = [m for m in media if clip_of_mask(m.name) is not None] if len(media) > 1 else []
    media = [m for m in media if m not in masks]
    if not media:
        return
    clip = media[0]
    path = f"{name}/{clip.name}"
    if not is_utf8(path):
        yield Reject("bad_name", repr(path), "the member's name is not UTF-8; rename it")
    elif repeated := [e for e, n in Counter(split_name(m.name)[1] for m in members).items() if n > 1]:
        yield Reject("repeated_key", path, f"its sample holds .{', .'.join(sorted(repeated))} twice; {RENAME}")
    elif len(media) > 1:
        yield Reject("several_clips", path, f"{len(media)} clips share the key {_key(clip.name)}; {RENAME}")
    elif _extension(clip) in FOREIGN_EXTENSIONS:
        yield Reject("unknown_container", path, f".{_extension(clip)} is not read; transcode to mp4")
    else:
        captions = _captions(archive, members, path)
        if isinstance(captions, Reject):
            yield captions
        else:
            source = Source(path, clip.size, mtime_ns, captions, name, clip.offset_data)
            yield _with_mask(source, masks[0], name) if masks else source


def _with_mask(source: Source, mask: tarfile.TarInfo, tar: str) -> Source:
    return replace(
        source,
        mask=f"{tar}/{mask.name}",
        mask_bytes=mask.size,
        mask_mtime_ns=source.mtime_ns,
        mask_file=tar,
        mask_offset=mask.offset_data,
    )


def _captions(archive: tarfile.TarFile, members: list[tarfile.TarInfo], path: str) -> tuple[str, ...] | Reject:
    problem = Reject("no_caption", path, "its sample has neither .json with a caption nor .txt; add one")
    for suffix in ("json", "txt"):
        # KEY.txt before KEY.b.c.txt.
        for member in sorted(members, key=lambda m: split_name(m.name)[1] != suffix):
            content = archive.extractfile(member) if _extension(member) == suffix else None
            if content is None:
                continue
            try:
                return parse_sidecar(content.read(), suffix == "json")
            except ValueError as error:
                # video2dataset's .json often has no caption, or null, where the .txt has one.
                if problem.code == "no_caption" and "has no caption" not in str(error):
                    problem = Reject("bad_caption", path, f".{suffix}: {error}")
    return problem


def _key(name: str) -> str:
    return split_name(name)[0]


def _extension(member: tarfile.TarInfo) -> str:
    return member.name.rpartition(".")[2].lower()
