"""Find samples in shards: one index per shard, one manifest for all.

A tar that was cut on a member boundary reads as a shorter data set without any error, and its payload has no
checksum. Hence the manifest with sizes and hashes, and a CRC-32 for every member in the index.
"""

import hashlib
import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wan_dist.core.errors import DataError, StorageError
from wan_dist.data.stores import CacheLimits, LocalStore, Store, StoredFile, open_store, read_whole

MANIFEST_NAME: Final = "manifest.json"
_MAX_OPEN_INDEXES: Final = 128

MEMBERS: Final = ("json", "text", "media", "mask")

INDEX_DTYPE: Final = np.dtype(
    [
        ("key", "S90"),
        ("media_ext", "S8"),
        *[(f"{m}_{f}", t) for m in MEMBERS for f, t in (("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4"))],
        ("width", "<u4"),
        ("height", "<u4"),
        ("num_frames", "<u4"),
        ("fps", "<f8"),
        ("duration_s", "<f8"),
        ("max_gap_s", "<f8"),
    ]
)
"""One row per sample: key; extension of the clip; offset and size in bytes and CRC-32 of each member, 0 for one that is
not there; width and
height as shown in px; frames; mean frames per second; seconds; longest time between two frames in seconds."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ShardEntry(_Strict):
    """One shard in the manifest. Sizes in bytes, hashes are SHA-256."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")
    num_clips: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    sha256: str
    index_name: str = Field(pattern=r"^[A-Za-z0-9_-]+\.idx\.npy$")
    index_bytes: int = Field(ge=0)
    index_sha256: str


class ConceptEntry(_Strict):
    """One concept of a OneTrainer-style source: how its author wants it weighed. `num_clips` counts listed files."""

    name: str
    kind: str
    repeats: float
    loss_weight: float
    num_clips: int = Field(ge=0)


class Manifest(_Strict):
    """What a folder of shards holds. `digest` covers every byte of shards and indexes."""

    version: Literal[1] = 1
    kind: Literal["clips"] = "clips"
    digest: str
    plan_digest: str
    num_clips: int
    num_bytes: int
    rejects: dict[str, int]
    warnings: dict[str, int] = {}
    concepts: tuple[ConceptEntry, ...] = Field(default=(), strict=False)
    shards: tuple[ShardEntry, ...] = Field(strict=False)


@dataclass(frozen=True)
class ShardSet:
    """An opened folder or URL of shards.

    Attributes:
        store: where they lie.
        manifest: what they hold.
        rebuilt: indexes that were missing and were made anew, by shard number.
    """

    store: Store
    manifest: Manifest
    rebuilt: dict[int, NDArray[Any]] = field(default_factory=dict)
    _recent: "_RecentIndexes" = field(default_factory=lambda: _RecentIndexes(), repr=False, compare=False)

    @property
    def name(self) -> str:
        """The folder or URL, for messages."""
        return self.store.name

    @property
    def folder(self) -> Path:
        """The folder they lie in.

        Raises:
            DataError: they lie on another machine.
        """
        if not isinstance(self.store, LocalStore):
            raise DataError(f"{self.name}: this needs shards in a local folder; copy them first.")
        return self.store.folder

    def tar_path(self, shard: int) -> Path:
        """Path of shard number `shard`; raises DataError if it lies on another machine."""
        return self.folder / self.manifest.shards[shard].name

    def tar(self, shard: int) -> StoredFile:
        """Shard number `shard`, wherever it lies."""
        return StoredFile(self.store, self.manifest.shards[shard].name)

    def index(self, shard: int) -> NDArray[Any]:
        """Return the index of shard number `shard`, [num_clips] of `INDEX_DTYPE`; that of a local file memory-mapped.

        Raises:
            DataError: it is not readable, or belongs to other shards.
        """
        if shard in self.rebuilt:
            return self.rebuilt[shard]
        return self._recent.get(shard, self._open_index)

    def _open_index(self, shard: int) -> NDArray[Any]:
        entry = self.manifest.shards[shard]
        file = StoredFile(self.store, entry.index_name)
        try:
            if isinstance(self.store, LocalStore):
                rows = np.load(self.store.folder / entry.index_name, mmap_mode="r", allow_pickle=False)
            else:
                rows = np.load(io.BytesIO(read_whole(self.store, entry.index_name)), allow_pickle=False)
        except FileNotFoundError:
            from wan_dist.data.reindex import restore_index

            rows = self.rebuilt[shard] = restore_index(self.store, entry)
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: not a readable index ({error}); copy it again or pack again.") from error
        if rows.dtype != INDEX_DTYPE or rows.shape != (entry.num_clips,):
            raise DataError(
                f"{file}: holds {rows.shape} rows of another kind than the {entry.num_clips} in {MANIFEST_NAME}; "
                "copy it again or pack again."
            )
        return rows


class _RecentIndexes:
    """The indexes used last: opening one takes 0.65 ms, reading a row of an open one a hundredth of that."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def get(self, shard: int, open_index: Callable[[int], NDArray[Any]]) -> NDArray[Any]:
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        rows = open_index(shard)
        with self._lock:
            self._open[shard] = rows
            if len(self._open) > _MAX_OPEN_INDEXES:
                self._open.popitem(last=False)
        return rows


def encode_index(rows: list[tuple[Any, ...]]) -> bytes:
    """Return the index file of rows in the order of `INDEX_DTYPE`'s fields."""
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype=INDEX_DTYPE), allow_pickle=False)
    return buffer.getvalue()


def shards_digest(shards: tuple[ShardEntry, ...]) -> str:
    """Return the SHA-256 over all shards and indexes, from their own."""
    content = [[s.name, s.num_clips, s.sha256, s.index_sha256] for s in shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def open_shards(where: Path | str, cache: CacheLimits | None = None) -> ShardSet:
    """Return the shards of a folder or URL after comparing what is there with the manifest.

    A missing index is made anew from its shard. Of remote shards only the manifest is read here; each one's size is
    compared, and a missing index made, when it is first read.

    Args:
        where: folder or URL of what `wan-data pack` or `wan-data index` wrote.
        cache: where parts of remote shards are kept; None keeps nothing.
    Raises:
        DataError: no or another manifest, a shard is missing or has another size, or is newer than its index.
        StorageError: the storage cannot be reached.
    """
    store = open_store(where, cache)
    manifest = _read_manifest(store)
    if not isinstance(store, LocalStore):
        return ShardSet(_SizedStore(store, {s.name: s.num_bytes for s in manifest.shards}), manifest)
    wrong = [w for s in manifest.shards for w in _wrong_files(store.folder, s)]
    if not wrong and (shards_digest(manifest.shards) != manifest.digest):
        wrong = [f"{MANIFEST_NAME} was edited (its digest does not match its shards)"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{store.name}: {'; '.join(wrong[:3])}{more}. Copy the folder again or pack again.")
    # Not at the top: making an index needs the reader and the prober, which need this module.
    from wan_dist.data.reindex import check_stale, restore_index

    missing = {n: s for n, s in enumerate(manifest.shards) if not (store.folder / s.index_name).exists()}
    shards = ShardSet(store, manifest, {n: restore_index(store, s) for n, s in missing.items()})
    check_stale(shards)
    return shards


def open_unchecked(where: Path | str) -> ShardSet:
    """Return the shards of a folder or URL by their manifest alone, whatever state they are in; for `verify_shards`.

    Raises:
        DataError: there is no manifest, or it is not readable.
        StorageError: the storage cannot be reached.
    """
    store = open_store(where)
    return ShardSet(store, _read_manifest(store))


def _read_manifest(store: Store) -> Manifest:
    try:
        content = read_whole(store, MANIFEST_NAME)
    except OSError:
        raise DataError(f"{store.name}: no {MANIFEST_NAME}: {_why_no_manifest(store)}.") from None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        part = ".".join(str(part) for part in first["loc"]) or "file"
        raise DataError(
            f"{StoredFile(store, MANIFEST_NAME)}: {part}: {first['msg']}; copy it again or pack again."
        ) from error


def _why_no_manifest(store: Store) -> str:
    if not isinstance(store, LocalStore):
        return "give the URL of the folder that `wan-data pack` wrote, copied with all its files"
    if (store.folder / "plan.json").exists():
        return "packing has not finished there; run `wan-data pack` again"
    if not store.folder.is_dir():
        return "there is no such folder"
    if any(store.folder.glob("*.tar")):
        return "tars of another program; run `wan-data index` there first, or set data.source to stream"
    return "run `wan-data pack CLIPS SHARDS` first"


def _wrong_files(folder: Path, entry: ShardEntry) -> list[str]:
    """Return what is wrong with the two files of a shard; a missing index is not."""
    wrong: list[str] = []
    for name, size in ((entry.name, entry.num_bytes), (entry.index_name, entry.index_bytes)):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            if name == entry.name:
                wrong.append(f"{name} is missing")
            continue
        if found != size:
            wrong.append(f"{name} has {found} bytes instead of {size}")
    return wrong


@dataclass(frozen=True)
class _SizedStore:
    """A remote store whose shards must have the sizes in the manifest; looked at when a shard is first read."""

    inner: Store
    sizes: Mapping[str, int]
    checked: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.inner.name

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def version(self, name: str) -> str:
        return self.inner.version(name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if name in self.sizes and name not in self.checked:
            found = self.inner.size(name)
            if found != self.sizes[name]:
                raise StorageError(
                    f"{self.name}/{name}: has {found} bytes instead of {self.sizes[name]}; copy it there again."
                )
            self.checked.add(name)
        return self.inner.read_range(name, offset, size)
