"""Find samples in shards: one index per shard, one manifest for all.

A tar that was cut on a member boundary reads as a shorter data set without any error, and its payload has no
checksum. Hence the manifest with sizes and hashes, and a CRC-32 for every member in the index.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wan_dist.core.errors import DataError

MANIFEST_NAME: Final = "manifest.json"
MEMBERS: Final = ("json", "text", "media")

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
"""One row per sample: key; extension of the clip; offset and size in bytes and CRC-32 of each member; width and
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


class Manifest(_Strict):
    """What a folder of shards holds. `digest` covers every byte of shards and indexes."""

    version: Literal[1] = 1
    kind: Literal["clips"] = "clips"
    digest: str
    plan_digest: str
    num_clips: int
    num_bytes: int
    rejects: dict[str, int]
    shards: tuple[ShardEntry, ...] = Field(strict=False)


@dataclass(frozen=True)
class ShardSet:
    """An opened folder of shards."""

    folder: Path
    manifest: Manifest

    def tar_path(self, shard: int) -> Path:
        """Path of shard number `shard`."""
        return self.folder / self.manifest.shards[shard].name

    def index(self, shard: int) -> NDArray[Any]:
        """Return the index of shard number `shard`, [num_clips] of `INDEX_DTYPE`, memory-mapped."""
        entry = self.manifest.shards[shard]
        path = self.folder / entry.index_name
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable index ({error}); copy it again or pack again.") from error
        if rows.dtype != INDEX_DTYPE or rows.shape != (entry.num_clips,):
            raise DataError(
                f"{path}: holds {rows.shape} rows of another kind than the {entry.num_clips} in {MANIFEST_NAME}; "
                "copy it again or pack again."
            )
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


def open_shards(folder: Path) -> ShardSet:
    """Return the shards of `folder` after comparing the size of each file with the manifest.

    Raises:
        DataError: no or another manifest, or a shard or index is missing or has another size.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        state = (
            "packing has not finished there; run `wan-data pack` again"
            if (folder / "plan.json").exists()
            else ("run `wan-data pack CLIPS SHARDS` first" if folder.is_dir() else "there is no such folder")
        )
        raise DataError(f"{folder}: no {MANIFEST_NAME}: {state}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise DataError(f"{path}: {where}: {first['msg']}; copy it again or pack again.") from error
    wrong = [w for s in manifest.shards for w in wrong_files(folder, s)]
    if not wrong and (shards_digest(manifest.shards) != manifest.digest):
        wrong = [f"{MANIFEST_NAME} was edited (its digest does not match its shards)"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{folder}: {'; '.join(wrong[:3])}{more}. Copy the folder again or pack again.")
    return ShardSet(folder, manifest)


def wrong_files(folder: Path, entry: ShardEntry) -> list[str]:
    """Return what is wrong with the two files of a shard, by their sizes."""
    wrong: list[str] = []
    for name, size in ((entry.name, entry.num_bytes), (entry.index_name, entry.index_bytes)):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if found != size:
            wrong.append(f"{name} has {found} bytes instead of {size}")
    return wrong
