"""Writing shards past the page cache, and where a file system knows no such thing."""

import errno
import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from wan_dist.data.output_file import OutputFile
from wan_dist.data.shard_format import write_shard

SIZES = [0, 1, 511, 512, 4096, 100_000, (4 << 20) - 512, 4 << 20, (9 << 20) + 7, 3]
DIRECT = getattr(os, "O_DIRECT", 0)


def content(number: int, size: int) -> bytes:
    return (hashlib.sha256(bytes([number])).digest() * (size // 32 + 1))[:size]


def test_a_shard_is_what_tarfile_writes(tmp_path: Path) -> None:
    wanted = io.BytesIO()
    with tarfile.open(fileobj=wanted, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(SIZES):
            info = tarfile.TarInfo(f"{number}.mp4")
            info.size, info.mode = size, 0o644
            tar.addfile(info, io.BytesIO(content(number, size)))
    with write_shard(tmp_path / "data.tar") as (writer, written):
        members = [writer.add(f"{n}.mp4", size, io.BytesIO(content(n, size))) for n, size in enumerate(SIZES)]
    data = (tmp_path / "data.tar").read_bytes()
    assert data == wanted.getvalue()
    assert (written[0].num_bytes, written[0].sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for member, (number, size) in zip(members, enumerate(SIZES), strict=True):
        part = data[member.offset : member.offset + member.size]
        assert part == content(number, size)
        assert member.crc32 == zlib.crc32(part)


def refuse_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def fake(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr("wan_dist.data.output_file.os.open", fake)


def refuse_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes whole 64 KiB only."""
    import fcntl

    real = os.pwrite

    def fake(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT and len(data) % (64 << 10):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr("wan_dist.data.output_file.os.pwrite", fake)


def write_little(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr("wan_dist.data.output_file.os.pwrite", lambda fd, data, at: real(fd, data[: 1 << 20], at))


@pytest.mark.parametrize("strange", [refuse_open, refuse_alignment, write_little])
def test_other_file_systems_get_the_same_bytes(
    strange: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange(monkeypatch)
    wanted = content(1, (5 << 20) + 12_345)
    with OutputFile(tmp_path / "x") as output:
        assert output.append_from(io.BytesIO(wanted), len(wanted)) == zlib.crc32(wanted)
        output.append(b"tail")
        assert output.finish() == hashlib.sha256(wanted + b"tail").hexdigest()
    assert (tmp_path / "x").read_bytes() == wanted + b"tail"
