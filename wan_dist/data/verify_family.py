"""Compare every byte of a cached family with what caching wrote down."""

from collections.abc import Callable
from pathlib import Path

from wan_dist.core.errors import DataError
from wan_dist.core.hashing import sha256_of
from wan_dist.data.family import FAMILY_NAME, Family, read_fingerprint, read_manifest, size_problems
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.fingerprint import digest_of
from wan_dist.data.index import MANIFEST_NAME, shards_digest
from wan_dist.data.verify import Damage


def verify_family(folder: Path, on_shard: Callable[[int, int], None] = lambda _done, _all: None) -> list[Damage]:
    """Return everything in a family that differs from its manifest and indexes, NaN and infinity included.

    Args:
        folder: of the family.
        on_shard: called after each shard with how many are done, and their number.
    Raises:
        DataError: it is unfinished, or its manifest is not readable.
    """
    family = Family(folder, read_manifest(folder))
    found = _verify_head(family)
    reader = FamilyReader(family)
    count = len(family.manifest.shards)
    for number in range(count):
        found += _verify_shard(family, number, reader)
        on_shard(number + 1, count)
    return found


def _verify_head(family: Family) -> list[Damage]:
    """Compare the manifest with itself, and the files beside the shards with it."""
    manifest, found = family.manifest, list[Damage]()
    if (
        shards_digest(manifest.shards) != manifest.digest
        or digest_of(family.fingerprint) != manifest.fingerprint_sha256
    ):
        where = str(family.folder / MANIFEST_NAME)
        found.append(Damage(where, None, "was edited (its digests do not match its content)"))
    try:
        if digest_of(read_fingerprint(family.folder)) != manifest.fingerprint_sha256:
            found.append(Damage(str(family.folder / FAMILY_NAME), None, "differs from the fingerprint in the manifest"))
    except DataError as error:
        path = family.folder / FAMILY_NAME
        found.append(Damage(str(path), None, str(error).removeprefix(f"{path}: ")))
    for name, sha256 in manifest.files.items():
        if what := _difference(family.folder / name, sha256):
            found.append(Damage(str(family.folder / name), None, what))
    return found


def _verify_shard(family: Family, number: int, reader: FamilyReader) -> list[Damage]:
    entry, tar = family.manifest.shards[number], family.tar_path(number)
    index = family.folder / entry.index_name
    wrong_sizes = size_problems(family.folder, entry)
    found = [Damage(str(family.folder / name), None, what) for name, what in wrong_sizes.items()]
    if index.name not in wrong_sizes and (what := _difference(index, entry.index_sha256)):
        found.append(Damage(str(index), None, f"index: its {what}"))
    if not tar.is_file():
        return found
    damaged: list[Damage] = []
    if not any(damage.file == str(index) for damage in found):
        damaged = _damaged_samples(family, number, reader)
    if not damaged and tar.name not in wrong_sizes and (what := _difference(tar, entry.sha256)):
        where = "and its index cannot say where" if found else "outside of all samples"
        damaged.append(Damage(str(tar), None, f"{what}, {where}"))
    return found + damaged


def _damaged_samples(family: Family, number: int, reader: FamilyReader) -> list[Damage]:
    damaged: list[Damage] = []
    for row, size in enumerate(family.index(number)["size"].tolist()):
        try:
            if size:
                reader.read(number, row)
        except DataError as error:
            where = str(family.tar_path(number))
            damaged.append(Damage(where, reader.key_of(number, row), str(error).rpartition(": ")[2]))
    return damaged


def _difference(path: Path, sha256: str) -> str | None:
    """Return what is wrong with a file, None if it has the hash."""
    try:
        return None if sha256_of(path) == sha256 else "SHA-256 differs"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
