"""The shard format, its index and its manifest."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.clips import write_clip
from wan_dist.core.errors import DataError
from wan_dist.data.index import MANIFEST_NAME, ShardSet, open_shards
from wan_dist.data.pack import pack_clips
from wan_dist.data.reader import locate, read_member
from wan_dist.data.shard_format import sample_keys, write_shard


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(5):
        write_clip(clips / f"clip.{number} x.mp4", 6 + number)
        (clips / f"clip.{number} x.txt").write_text(f"caption {number}")
    pack_clips(clips, tmp_path / "shards", shard_clips=2)
    return tmp_path / "shards"


def test_keys_are_safe_and_unique() -> None:
    paths = ["a.mp4", "b/c d.1.mp4", "b_c_d_1.webm", "x.mp4", "X.mov", "é" * 100 + ".mp4", "é" * 100 + "b.mp4", "..mp4"]
    keys = sample_keys(paths)
    assert keys["a.mp4"] == "a"
    assert len({k.lower() for k in keys.values()}) == len(paths)
    assert all(
        0 < len(k) <= 88 and k.replace("-", "_").replace("_", "a").isalnum() and k.isascii() for k in keys.values()
    )
    # A key depends neither on the order of the paths nor on clips that do not share it.
    assert sample_keys(reversed(paths)) == keys
    assert sample_keys([*paths, "new.mp4"])["a.mp4"] == "a"


def test_shards_are_plain_deterministic_ustar(packed: Path) -> None:
    with tarfile.open(packed / "data-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"clip_{n}_x.{e}" for n in (0, 1) for e in ("json", "txt", "mp4")]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o644, "", "")}
    assert not any(m.pax_headers for m in members)


def test_a_failed_shard_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="unexpected end"), write_shard(tmp_path / "data-000000.tar") as (writer, _):
        writer.add("a.mp4", 10, io.BytesIO(b"short"))
    assert list(tmp_path.iterdir()) == []


READ_WITH_WEBDATASET = """
import hashlib, json, sys
from webdataset.compat import WebDataset
for sample in WebDataset(sys.argv[1:], shardshuffle=False):
    members = {k: hashlib.sha256(v).hexdigest() for k, v in sample.items() if not k.startswith("__")}
    print(json.dumps([sample["__key__"], members]))
"""


def test_plain_webdataset_reads_the_same_keys_and_bytes(packed: Path) -> None:
    command = [sys.executable, "-c", READ_WITH_WEBDATASET, *map(str, sorted(packed.glob("*.tar")))]
    # The variable counts only if it is set before the import, hence a process of its own.
    done = subprocess.run(command, env={**os.environ, "WDS_SECURE": "1"}, capture_output=True, text=True, check=True)
    opened = open_shards(packed)
    wanted = [
        [
            row["key"].decode(),
            {
                extension: hashlib.sha256(read_member(locate(opened.tar_path(shard), row, member))).hexdigest()
                for extension, member in (("json", "json"), ("txt", "text"), ("mp4", "media"))
            },
        ]
        for shard in range(3)
        for row in opened.index(shard)
    ]
    assert [json.loads(line) for line in done.stdout.splitlines()] == wanted
    assert len(wanted) == 5


def test_index_tells_size_frames_and_rate(packed: Path) -> None:
    opened = open_shards(packed)
    assert [int(row["num_frames"]) for s in range(3) for row in opened.index(s)] == [6, 7, 8, 9, 10]
    row = opened.index(0)[0]
    assert (row["width"], row["height"], row["fps"]) == (160, 96, pytest.approx(24))
    assert row["duration_s"] == pytest.approx(6 / 24)


def test_damage_is_noticed_when_read(packed: Path) -> None:
    opened: ShardSet = open_shards(packed)
    row = opened.index(1)[0]
    where = locate(opened.tar_path(1), row, "media")
    with opened.tar_path(1).open("r+b") as stream:
        stream.seek(where.offset + where.size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DataError, match=r"data-000001\.tar: sample clip_2_x: damaged"):
        read_member(where)


def damage(folder: Path, how: str) -> None:
    tar, index, manifest = folder / "data-000001.tar", folder / "data-000001.idx.npy", folder / MANIFEST_NAME
    if how == "cut":
        os.truncate(tar, tar.stat().st_size - 512)
    elif how == "gone":
        tar.unlink()
    elif how == "index":
        index.write_bytes(index.read_bytes()[:-1])
    elif how == "edited":
        manifest.write_text(
            manifest.read_text().replace('"sha256":"', '"sha256":"0', 1).replace('"sha256": "', '"sha256": "0', 1)
        )
    elif how == "unknown":
        manifest.write_text(manifest.read_text().replace('"version"', '"verzion"'))
    elif how == "unfinished":
        manifest.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"data-000001\.tar has \d+ bytes instead of"),
        ("gone", r"data-000001\.tar is missing"),
        ("index", r"data-000001\.idx\.npy has"),
        ("edited", "was edited"),
        ("unknown", "verzion"),
        ("unfinished", "has not finished"),
    ],
)
def test_opening_checks_the_folder(packed: Path, how: str, message: str) -> None:
    damage(packed, how)
    with pytest.raises(DataError, match=message) as caught:
        open_shards(packed)
    assert "\n" not in str(caught.value)


def test_an_index_of_another_shard_is_refused(packed: Path) -> None:
    # Same size, other content: no pickle is ever loaded, and kind and length are compared.
    index = packed / "data-000000.idx.npy"
    index.write_bytes(b"\x80\x04K\x01.".ljust(index.stat().st_size, b"\0"))
    with pytest.raises(DataError, match="not a readable index"):
        open_shards(packed).index(0)
