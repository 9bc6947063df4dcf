"""Make indexes from shards: of a tar that another program wrote, or of one whose index was lost."""

import hashlib
import io
import json
import logging
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.errors import DataError
from wan_dist.core.hashing import sha256_of
from wan_dist.data.index import (
    MANIFEST_NAME,
    MEMBERS,
    Manifest,
    ShardEntry,
    ShardSet,
    encode_index,
    open_shards,
    shards_digest,
)
from wan_dist.data.probe import ClipInfo, Reject
from wan_dist.data.probe_worker import Prober
from wan_dist.data.reader import CAPTION_KEYS, locate, read_member
from wan_dist.data.shard_format import write_file
from wan_dist.data.source_files import CLIP_EXTENSIONS
from wan_dist.data.spans import FileSpan
from wan_dist.data.stores import LocalStore, Store, StoredFile
from wan_dist.data.tar_walk import RENAME, TarMember, TarSample, index_key, member_named, split_name, walk_tar

logger = logging.getLogger(__name__)

_INFO_FIELDS: Final = ("width", "height", "num_frames", "fps", "duration_s", "max_gap_s")
_NO_MEMBER: Final = TarMember(0, 0, 0)
_SAMPLES_CHECKED: Final = 64
REJECTS_NAME: Final = "rejects.jsonl"
FOREIGN_PLAN: Final = "foreign"
"""`plan_digest` of a manifest that `wan-data index` made."""


def index_tar(tar: Path | StoredFile, on_sample: Callable[[], None] = lambda: None) -> tuple[bytes, list[Reject]]:
    """Return the index file of any tar, and the samples that were left out of it.

    Every byte is read once, for the checksums. What packing wrote about a clip is believed; other clips are probed in
    a process of their own.

    Args:
        tar: an uncompressed tar, here or in a store.
        on_sample: called after each sample.
    Raises:
        DataError: it is no whole tar.
    """
    rows: dict[bytes, tuple[Any, ...]] = {}
    rejects: list[Reject] = []
    repeated: dict[bytes, str] = {}
    file = StoredFile(LocalStore(tar.parent), tar.name) if isinstance(tar, Path) else tar

    def content(member: TarMember) -> bytes:
        return file.read_range(member.offset, member.size)

    with Prober() as prober:
        for sample in walk_tar(tar, checksums=True):
            name = f"{file.name}: {sample.key}"
            found = _row(sample, content, prober, name)
            if isinstance(found, Reject):
                rejects.append(found)
            elif found[0] in rows:
                repeated[found[0]] = name
            else:
                rows[found[0]] = found
            on_sample()
    # Nobody can say which of them is meant.
    rejects += [
        Reject("repeated_key", name, f"several samples of the tar have this key; {RENAME}")
        for name in repeated.values()
    ]
    return encode_index([row for key, row in rows.items() if key not in repeated]), rejects


def index_folder(folder: Path, on_shard: Callable[[int, int], None] = lambda _done, _all: None) -> Manifest:
    """Write index and manifest for the tars of a folder that another program wrote; return the manifest.

    Args:
        folder: holds `*.tar` and no manifest.
        on_shard: called after each tar with how many are done, and their number.
    Raises:
        DataError: there is a manifest already, no tar, or no usable clip.
    """
    if (folder / MANIFEST_NAME).exists():
        shards = open_shards(folder)
        return shards.manifest
    tars = sorted(folder.glob("*.tar"))
    if not tars or (folder / "plan.json").exists():
        raise DataError(f"{folder}: no tars to index, or packing has not finished there; run `wan-data pack`.")
    entries: list[ShardEntry] = []
    rejects: list[Reject] = []
    for number, path in enumerate(tars):
        content, left_out = index_tar(path)
        index = write_file(path.with_suffix(".idx.npy"), content)
        rejects += left_out
        entries.append(
            ShardEntry(
                name=path.name,
                num_clips=len(np.load(path.with_suffix(".idx.npy"), mmap_mode="r")),
                num_bytes=path.stat().st_size,
                sha256=sha256_of(path),
                index_name=path.with_suffix(".idx.npy").name,
                index_bytes=index.num_bytes,
                index_sha256=index.sha256,
            )
        )
        on_shard(number + 1, len(tars))
    by_code = dict(sorted(Counter(r.code for r in rejects).items()))
    num_clips = sum(e.num_clips for e in entries)
    lines = "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects)
    write_file(folder / REJECTS_NAME, lines.encode())
    if not num_clips:
        # Indexes of no clip would look like a data set.
        for entry in entries:
            (folder / entry.index_name).unlink()
        first = f" First: {rejects[0].path}: {rejects[0].hint}. All are in {folder / REJECTS_NAME}." if rejects else ""
        reasons = ", ".join(f"{count} {code}" for code, count in by_code.items()) or "they are empty"
        raise DataError(f"{folder}: no clip in its tars can be used ({reasons}).{first}")
    manifest = Manifest(
        digest=shards_digest(tuple(entries)),
        plan_digest=FOREIGN_PLAN,
        num_clips=num_clips,
        num_bytes=sum(e.num_bytes for e in entries),
        rejects=by_code,
        shards=tuple(entries),
    )
    write_file(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode() + b"\n")
    return manifest


def restore_index(store: Store, entry: ShardEntry) -> NDArray[Any]:
    """Return the index of a shard that lost it, made from the shard and written back where that is possible.

    Every byte of the shard is read, because the index holds checksums: of a remote one, all of it comes once.

    Raises:
        DataError: the shard is not the one in the manifest any more.
        StorageError: its storage cannot be reached.
    """
    path = StoredFile(store, entry.name)
    logger.warning("%s: %s is missing; making it anew from the shard", store.name, entry.index_name)
    content, _ = index_tar(path)
    if len(content) != entry.index_bytes or hashlib.sha256(content).hexdigest() != entry.index_sha256:
        raise DataError(
            f"{path}: {entry.index_name} is missing, and the one made anew differs from {MANIFEST_NAME}: the shard "
            "was changed or another version packed it; copy the folder again or pack again."
        )
    if isinstance(store, LocalStore):
        try:
            write_file(store.folder / entry.index_name, content)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); kept in memory", store.folder / entry.index_name, error)
    return np.load(io.BytesIO(content), allow_pickle=False)


def check_stale(shards: ShardSet) -> None:
    """Return if no shard was replaced after its index was written.

    Files that were copied are often newer than their index, so a later time alone is no proof: headers are compared
    then, and the checksums of a few captions.

    Raises:
        DataError: a shard and its index differ.
    """
    for number, entry in enumerate(shards.manifest.shards):
        index_path = shards.folder / entry.index_name
        if number in shards.rebuilt or shards.tar_path(number).stat().st_mtime_ns <= index_path.stat().st_mtime_ns:
            continue
        rows = shards.index(number)
        for place in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _SAMPLES_CHECKED)).astype(int)):
            if problem := _mismatch(shards.tar(number), cast(np.void, rows[place])):
                raise DataError(
                    f"{index_path}: older than {entry.name} and stale: {problem}; "
                    "copy both again from one source, or pack again."
                )


def _mismatch(tar: StoredFile, row: np.void) -> str | None:
    """Return what a row of an index and its shard differ in."""
    where, key = locate(tar, row, "media"), row["key"]
    try:
        header = tarfile.TarInfo.frombuf(tar.read_range(where.offset - 512, 512), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return f"no clip begins where it says that {key.decode()} does"
    # A header holds 100 bytes of a name; longer ones stand elsewhere.
    if header.size != where.size or (len(header.name) < 100 and index_key(split_name(header.name)[0]) != key):
        return f"{header.name} of {header.size} bytes stands where it says {key.decode()} of {where.size} bytes"
    if row["json_size"]:
        try:
            read_member(locate(tar, row, "json"))
        except DataError:
            return f"the description of {key.decode()} has another checksum"
    return None


def media_extension(extensions: Iterable[str]) -> str | None:
    """Return which of a sample's members is its clip; masks are none."""
    return next((e for e in extensions if e.rpartition(".")[2] in CLIP_EXTENSIONS and not _is_mask(e)), None)


def _is_mask(extension: str) -> bool:
    return "mask" in extension.split(".")[:-1]


def _row(
    sample: TarSample, content: Callable[[TarMember], bytes], prober: Prober, name: str
) -> tuple[Any, ...] | Reject:
    """Return the index row of a sample, or why it is left out."""
    extension = media_extension(sample.members)
    if extension is None:
        return Reject("no_media", name, f"has {', '.join(sample.members)}; clips are .{', .'.join(CLIP_EXTENSIONS)}")
    if sample.repeated:
        return Reject("repeated_key", name, f"holds .{', .'.join(sorted(sample.repeated))} twice; {RENAME}")
    if num_others := sum(media_extension([e]) is not None for e in sample.members) - 1:
        return Reject("several_clips", name, f"{num_others + 1} clips share this key; {RENAME}")
    description, text = (member_named(sample.members, suffix) for suffix in ("json", "txt"))
    members = {
        "json": sample.members[description] if description else None,
        "text": sample.members[text] if text else None,
        "media": sample.members[extension],
        "mask": next((place for e, place in sample.members.items() if _is_mask(e)), None),
    }
    described: dict[str, Any] = {}
    if members["json"]:
        try:
            described = json.loads(content(members["json"]))
        except ValueError:
            return Reject("bad_json", name, "its json is not readable; mend it")
    if not members["text"] and not (isinstance(described, dict) and any(described.get(k) for k in CAPTION_KEYS)):
        return Reject("no_caption", name, f"neither a txt nor a json with {', '.join(CAPTION_KEYS)}; add one")
    numbers = _described(described)
    if numbers is None:
        info = probe_bytes(content(sample.members[extension]), extension, name, prober)
        if isinstance(info, Reject):
            return info
        numbers = [getattr(info, field) for field in _INFO_FIELDS]
    places = [v for m in MEMBERS for x in [members[m] or _NO_MEMBER] for v in (x.offset, x.size, x.crc32)]
    return (index_key(sample.key), extension.rpartition(".")[2].encode(), *places, *numbers)


def _described(described: Any) -> list[float] | None:
    """Return what packing wrote about a clip, in the order of the index; None for another program's json."""
    if not isinstance(described, dict) or "captions" not in described:
        return None
    numbers = [described.get(name) for name in _INFO_FIELDS]
    return numbers if all(isinstance(n, int | float) for n in numbers) else None  # type: ignore[return-value]


def probe_bytes(content: bytes, extension: str, name: str, prober: Prober | None = None) -> ClipInfo | Reject:
    """Return what a clip holds, or why it cannot be used; it is read in a process of its own.

    Args:
        content: the file.
        extension: of its name.
        name: how a `Reject` names it.
        prober: a running process; None starts one.
    """
    if prober is None:
        with Prober() as prober:
            return probe_bytes(content, extension, name, prober)
    with tempfile.NamedTemporaryFile(suffix=f".{extension.rpartition('.')[2]}") as stream:
        stream.write(content)
        stream.flush()
        return prober.probe(FileSpan(Path(stream.name)), name)
