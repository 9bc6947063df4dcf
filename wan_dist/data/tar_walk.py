"""Walk the headers of any tar and group its members into samples, as webdataset does."""

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from wan_dist.core.errors import DataError
from wan_dist.data.stores import LocalStore, StoredFile, open_stream

MAX_INDEX_KEY_BYTES: Final = 90
_PIECE_BYTES: Final = 1 << 20

RENAME: Final = "keys end at the first dot of a name; rename one (other dots as _) and make the tar again"
"""What to do about samples that cannot be told apart."""


@dataclass(frozen=True)
class TarMember:
    """One file in a tar: offset and size of its content in bytes, and the CRC-32 of it if it was read."""

    offset: int
    size: int
    crc32: int = 0


@dataclass
class TarSample:
    """Adjacent members whose names are equal up to the first dot of their last part.

    Attributes:
        key: what their names have in common.
        members: extension to member; of several with one extension the first.
        repeated: extensions that more than one member has.
    """

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)


def walk_tar(path: Path | StoredFile, *, checksums: bool = False) -> Iterator[TarSample]:
    """Yield the samples of a tar in their order. Long names in PAX or GNU headers are understood.

    Args:
        path: an uncompressed tar, here or in a store.
        checksums: read every member and compute its CRC-32.
    Raises:
        DataError: not a tar, or cut off.
    """
    try:
        file = StoredFile(LocalStore(path.parent), path.name) if isinstance(path, Path) else path
        with open_stream(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            sample: TarSample | None = None
            for info in tar:
                tar.members = []  # tarfile would keep them all  # type: ignore[assignment]
                if not info.isfile():
                    continue
                key, extension = split_name(info.name)
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = TarSample(key)
                if extension in sample.members:
                    sample.repeated.add(extension)
                    continue
                crc32 = _checksum(tar, info) if checksums else 0
                sample.members[extension] = TarMember(info.offset_data, info.size, crc32)
            if sample is not None:
                yield sample
            end, size = tar.offset, stream.seek(0, io.SEEK_END)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar ({error}); copy or download it again.") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the disk and the path.") from error
    if end > size:
        raise DataError(f"{path}: cut off: its last member ends at byte {end} of {size}; copy it again.")


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case extension of a member's name.

    Source: `base_plus_ext` of webdataset 1.0, by whose rule a key ends at the first dot of the name's last part.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def member_named(extensions: Iterable[str], suffix: str) -> str | None:
    """Return which of a sample's members is its json or txt: `KEY.txt`, or else one like `KEY.b.c.txt`."""
    ours = [e for e in extensions if e.rpartition(".")[2] == suffix]
    return suffix if suffix in ours else next(iter(ours), None)


def index_key(key: str) -> bytes:
    """Return a key as an index holds it: UTF-8, a long one cut and its hash appended."""
    encoded = key.encode("utf-8", "surrogateescape")
    if len(encoded) <= MAX_INDEX_KEY_BYTES and encoded.decode("utf-8", "replace").encode() == encoded:
        return encoded
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded.decode('ascii', 'replace').encode('ascii', 'replace').decode()[:70]}-{digest}".encode()


def _checksum(tar: tarfile.TarFile, info: tarfile.TarInfo) -> int:
    stream = tar.extractfile(info)
    assert stream is not None
    crc32 = num_bytes = 0
    while piece := stream.read(_PIECE_BYTES):
        crc32 = zlib.crc32(piece, crc32)
        num_bytes += len(piece)
    if num_bytes != info.size:
        raise tarfile.ReadError(f"{info.name}: {num_bytes} of {info.size} bytes are there")
    return crc32
