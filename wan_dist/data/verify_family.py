"""Compare every byte of a cached family with what caching wrote down."""

from collections.abc import Callable
from pathlib import Path

from wan_dist.core.errors import DataError
from wan_dist.core.hashing import sha256_of
from wan_dist.data.family import Family, open_family, read_fingerprint
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.verify import Damage


def verify_family(folder: Path, on_shard: Callable[[int, int], None] = lambda _done, _all: None) -> list[Damage]:
    """Return everything in a family that differs from its manifest and indexes, NaN and infinity included.

    Args:
        folder: of the family.
        on_shard: called after each shard with how many are done, and their number.
    Raises:
        DataError: it is unfinished, or files are missing or have another size.
    """
    family = open_family(folder, read_fingerprint(folder)["kind"])
    reader = FamilyReader(family)
    found = [
        Damage(str(folder / name), None, "SHA-256 differs")
        for name, sha256 in family.manifest.files.items()
        if sha256_of(folder / name) != sha256
    ]
    count = len(family.manifest.shards)
    for number in range(count):
        found += _verify_shard(family, number, reader)
        on_shard(number + 1, count)
    return found


def _verify_shard(family: Family, number: int, reader: FamilyReader) -> list[Damage]:
    entry, tar = family.manifest.shards[number], family.tar_path(number)
    if sha256_of(family.folder / entry.index_name) != entry.index_sha256:
        return [Damage(str(family.folder / entry.index_name), None, "index: its SHA-256 differs")]
    damaged: list[Damage] = []
    for row, size in enumerate(family.index(number)["size"].tolist()):
        try:
            if size:
                reader.read(number, row)
        except DataError as error:
            damaged.append(Damage(str(tar), reader.key_of(number, row), str(error).rpartition(": ")[2]))
    if not damaged and sha256_of(tar) != entry.sha256:
        damaged.append(Damage(str(tar), None, "SHA-256 differs, outside of all samples"))
    return damaged
