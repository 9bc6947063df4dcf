"""Cached families: latents or text embeddings of packed clips, as shards with the clips' numbers and keys.

    SHARDS/latents-0123456789ab/latents-000000.tar, latents-000000.idx.npy, ..., family.json, manifest.json
    SHARDS/text-ba9876543210/text-000000.tar, ..., empty.safetensors

The name carries the start of the fingerprint's hash. `family.json` holds the fingerprint from the first second on,
`manifest.json` is written last and holds it too. Plain `webdataset` reads the tars; an index has one row per row of the
clips' index, so that the two join by number.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wan_dist.core.errors import DataError
from wan_dist.data.fingerprint import Kind, digest_of
from wan_dist.data.index import MANIFEST_NAME, ShardEntry, shards_digest

FAMILY_NAME: Final = "family.json"
EMPTY_NAME: Final = "empty.safetensors"
"""Embedding of the empty prompt in a text family: for caption dropout and guidance."""

FAMILY_INDEX_DTYPE: Final = np.dtype([("key", "S90"), ("offset", "<u8"), ("size", "<u8"), ("crc32", "<u4")])
"""One row per clip of the shard: key; offset, size in bytes and CRC-32 of its member. Size 0: it has none."""

_AGAIN: Final = "run `wan-data cache` again"


class FamilyManifest(BaseModel):
    """What a family holds. `digest` covers every byte of its shards and indexes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: Literal[1] = 1
    kind: Kind
    fingerprint: dict[str, Any]
    fingerprint_sha256: str
    digest: str
    num_clips: int = Field(ge=0)
    num_bytes: int = Field(ge=0)
    rejects: dict[str, int]
    shards: tuple[ShardEntry, ...] = Field(strict=False)
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of further files, by name.")


@dataclass(frozen=True)
class Family:
    """An opened family."""

    folder: Path
    manifest: FamilyManifest

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What shaped its content, see `wan_dist.data.fingerprint`."""
        return self.manifest.fingerprint

    def tar_path(self, shard: int) -> Path:
        """Path of shard number `shard`."""
        return self.folder / self.manifest.shards[shard].name

    def index(self, shard: int) -> NDArray[Any]:
        """Return the index of shard number `shard`, one row per clip of that number's clip shard, memory-mapped."""
        path = self.folder / self.manifest.shards[shard].index_name
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable index ({error}); copy it again, or {_AGAIN}.") from error
        if rows.dtype != FAMILY_INDEX_DTYPE or rows.ndim != 1:
            raise DataError(f"{path}: holds rows of another kind; copy it again, or {_AGAIN}.")
        return rows


def shard_stem(kind: Kind, number: int) -> str:
    """Return the name of a family's shard without its extension; `number` is that of the clip shard."""
    return f"{kind}-{number:06d}"


def family_folder(shards_dir: Path, fingerprint: dict[str, Any]) -> Path:
    """Return where the family of a fingerprint lies, inside the folder of its clips."""
    return shards_dir / f"{fingerprint['kind']}-{digest_of(fingerprint)[:12]}"


def find_families(shards_dir: Path, kind: Kind) -> list[Path]:
    """Return the folders of all families of a kind, finished or not."""
    return sorted(path.parent for path in shards_dir.glob(f"{kind}-*/{FAMILY_NAME}"))


def encode_family_index(rows: NDArray[Any]) -> bytes:
    """Return the index file of `rows`, [num_clips] of `FAMILY_INDEX_DTYPE`."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


def open_family(folder: Path, kind: Kind) -> Family:
    """Return a finished family after comparing the size of each of its files with the manifest.

    Raises:
        DataError: it is unfinished, of another kind, or files are missing or have another size.
    """
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise DataError(f"{folder}: holds {manifest.kind}, not {kind}; give the folder of the other family.")
    wrong = [f"{name} {what}" for entry in manifest.shards for name, what in size_problems(folder, entry).items()]
    wrong += [f"{name} is missing" for name in manifest.files if not (folder / name).is_file()]
    if not wrong and (
        shards_digest(manifest.shards) != manifest.digest
        or digest_of(manifest.fingerprint) != manifest.fingerprint_sha256
    ):
        wrong = [f"{MANIFEST_NAME} was edited (its digests do not match its content)"]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"{folder}: {'; '.join(wrong[:3])}{more}. Copy the folder again, or {_AGAIN}.")
    return Family(folder, manifest)


def read_manifest(folder: Path) -> FamilyManifest:
    """Return a family's manifest; raises DataError if it is not finished or not readable."""
    path = folder / MANIFEST_NAME
    try:
        return FamilyManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        state = f"caching has not finished there; {_AGAIN}" if (folder / FAMILY_NAME).exists() else "no cached family"
        raise DataError(f"{folder}: no {MANIFEST_NAME}: {state}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise DataError(f"{path}: {where}: {first['msg']}; copy it again, or {_AGAIN}.") from error


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """Return the fingerprint of a family, finished or not; raises DataError if it is not readable."""
    path = folder / FAMILY_NAME
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); move the folder away, then {_AGAIN}.") from None


def size_problems(folder: Path, entry: ShardEntry) -> dict[str, str]:
    """Return what is wrong with the two files of a family's shard by their sizes, by name."""
    wrong: dict[str, str] = {}
    for name, size in ((entry.name, entry.num_bytes), (entry.index_name, entry.index_bytes)):
        try:
            found = (folder / name).stat().st_size
        except OSError:
            wrong[name] = "is missing"
            continue
        if found != size:
            wrong[name] = f"has {found} bytes instead of {size}"
    return wrong
