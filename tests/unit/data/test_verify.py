"""Verifying shards, lost and stale indexes, and tars of other programs."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.clips import read_numbers, write_clip
from wan_dist.core.errors import DataError
from wan_dist.data.clips import ClipDataset
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.index import open_shards, open_unchecked
from wan_dist.data.pack import pack_clips
from wan_dist.data.reindex import index_folder
from wan_dist.data.tar_walk import walk_tar
from wan_dist.data.verify import verify_shards

CENTER = (0.5, 0.5)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(4):
        write_clip(clips / f"{number}.mp4", 6, first=10 * number)
        (clips / f"{number}.txt").write_text(f"caption {number}")
    pack_clips(clips, tmp_path / "shards", shard_clips=2)
    return tmp_path / "shards"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_whole_shards_verify(packed: Path) -> None:
    assert verify_shards(open_shards(packed)) == []


def test_verify_names_each_damaged_file_and_sample(packed: Path) -> None:
    opened = open_shards(packed)
    tar = opened.tar_path(1)
    rows = np.array(opened.index(1))
    flip(tar, int(rows[0]["media_offset"]) + 5)
    flip(tar, int(rows[1]["text_offset"]))
    flip(packed / "data-000000.idx.npy", -1 % (packed / "data-000000.idx.npy").stat().st_size)
    flip(opened.tar_path(0), opened.tar_path(0).stat().st_size - 1)
    found = {(Path(d.file).name, d.sample, d.what.partition(":")[0]) for d in verify_shards(opened)}
    assert found == {
        ("data-000001.tar", "2", "media"),
        ("data-000001.tar", "3", "text"),
        ("data-000000.idx.npy", None, "index"),
        ("data-000000.tar", None, "SHA-256 differs, outside of all samples"),
    }


def test_one_missing_or_short_shard_hides_no_other_damage(packed: Path, tmp_path: Path) -> None:
    pack_clips(tmp_path / "clips", tmp_path / "five", shard_clips=1)
    folder = tmp_path / "five"
    tars, indexes = sorted(folder.glob("*.tar")), sorted(folder.glob("*.npy"))
    last = np.array(open_shards(folder).index(3))[0]
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:3000])
    indexes[2].write_bytes(b"nothing")
    flip(tars[2], 600)
    flip(tars[3], int(last["media_offset"]) + 5)
    indexes[3].unlink()
    with pytest.raises(DataError, match="is missing; "):
        open_shards(folder)
    found = [(Path(d.file).name, d.sample, d.what.partition(":")[0]) for d in verify_shards(open_unchecked(folder))]
    assert found == [
        (tars[0].name, None, "is missing"),
        (tars[1].name, None, f"has 3000 bytes instead of {(packed / 'data-000000.tar').stat().st_size}"),
        (tars[1].name, "1", "media"),
        (indexes[2].name, None, "index"),
        (tars[2].name, None, "SHA-256 differs, and its index cannot say where"),
        (indexes[3].name, None, "index"),
        (tars[3].name, None, "SHA-256 differs, and its index cannot say where"),
    ]


def test_verify_decodes_when_asked(packed: Path) -> None:
    assert verify_shards(open_shards(packed), open_decoder("thread")) == []


def test_a_lost_index_is_made_anew_byte_for_byte(packed: Path) -> None:
    path = packed / "data-000001.idx.npy"
    before = path.read_bytes()
    path.unlink()
    assert [row["key"] for row in open_shards(packed).index(1)] == [b"2", b"3"]
    assert path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_lost_index_is_kept_in_memory_where_it_cannot_be_written(packed: Path) -> None:
    (packed / "data-000001.idx.npy").unlink()
    packed.chmod(0o555)
    assert len(open_shards(packed).index(1)) == 2


def test_an_index_older_than_a_replaced_shard_is_refused(packed: Path) -> None:
    first, second = packed / "data-000000.tar", packed / "data-000001.tar"
    assert first.stat().st_size == second.stat().st_size
    # Copied later than its index, but the same: no reason to stop.
    first.write_bytes(first.read_bytes())
    open_shards(packed)
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"data-000000\.idx\.npy: older than data-000000\.tar and stale: 2\.mp4"):
        open_shards(packed)
    (packed / "data-000000.idx.npy").unlink()
    with pytest.raises(DataError, match="is missing, and the one made anew differs"):
        open_shards(packed)


def write_foreign(path: Path, samples: dict[str, dict[str, bytes]], tar_format: int) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime = len(content), 1.5  # a fraction: PAX adds a header of its own
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_other_programs_are_indexed(tmp_path: Path, tar_format: int) -> None:
    names = ("0.mp4", "1.mp4", "2.ts")
    clips = [write_clip(tmp_path / name, 6, first=10 * n).read_bytes() for n, name in enumerate(names)]
    long_key = "folder/" + "é" * 70
    samples = {
        "a/0": {"mp4": clips[0], "txt": b"zero"},
        long_key: {"mp4": clips[1], "json": json.dumps({"caption": "one", "width": 1}).encode()},
        "2": {"TS": clips[2], "json": b'{"caption": null}', "txt": b"\xef\xbb\xbftwo"},
        "no-caption": {"mp4": clips[0]},
        "no-clip": {"txt": b"x"},
        "broken": {"mp4": b"<html>", "txt": b"x"},
    }
    folder = tmp_path / "foreign"
    folder.mkdir()
    write_foreign(folder / "00000.tar", samples, tar_format)
    with pytest.raises(DataError, match="tars of another program; run `wan-data index`"):
        open_shards(folder)
    manifest = index_folder(folder)
    assert (manifest.num_clips, manifest.rejects) == (3, {"no_caption": 1, "no_media": 1, "not_media": 1})
    dataset = ClipDataset.open(folder, sizes=[(80, 48)], num_frames=[5], fps=24.0)
    found = [dataset.load(0, 0, n, choice=0.0, crop_xy=CENTER) for n in range(3)]
    assert [s.captions for s in found] == [("zero",), ("one",), ("two",)]
    assert [read_numbers(s.frames)[0] for s in found] == [0, 10, 20]
    assert verify_shards(open_shards(folder)) == []
    assert index_folder(folder) == manifest


def test_damaged_tars_are_named(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_foreign(path, {"a": {"txt": bytes(5000)}, "b": {"txt": bytes(5000)}}, tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    path.write_bytes(whole[:7000])
    with pytest.raises(DataError, match=r"00000\.tar: (cut off|not a whole tar)"):
        list(walk_tar(path, checksums=True))
    path.write_bytes(b"x" * 2048)
    with pytest.raises(DataError, match="not a whole tar"):
        list(walk_tar(path))


def add_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_index_and_pack_agree_about_odd_samples_of_a_tar(tmp_path: Path) -> None:
    clip, other = (write_clip(tmp_path / f"{n}.mp4", 6, first=10 * n).read_bytes() for n in range(2))
    folder = tmp_path / "foreign"
    folder.mkdir()
    samples = [
        ("good.mp4", clip),
        ("good.txt", b"good"),
        ("dotted.b.c.mp4", other),
        ("dotted.b.c.txt", b"dotted"),
        ("text-twice.mp4", clip),
        ("text-twice.txt", b"one"),
        ("text-twice.TXT", b"two"),
        ("clip-twice.mp4", clip),
        ("clip-twice.mp4", other),
        ("clip-twice.txt", b"two"),
        ("apart.mp4", clip),
        ("apart.txt", b"one"),
        ("two.a.mp4", clip),
        ("two.a.txt", b"one"),
        ("two.b.mp4", other),
        ("two.b.txt", b"two"),
        ("apart.mp4", other),
        ("apart.txt", b"two"),
    ]
    add_members(folder / "00000.tar", samples)
    manifest = index_folder(folder)
    rejects = {"repeated_key": 3, "several_clips": 1}
    assert (manifest.num_clips, manifest.rejects) == (2, rejects)
    listed = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert {row["path"].split(": ")[1] for row in listed} == {"text-twice", "clip-twice", "apart", "two"}
    assert all("first dot" in row["hint"] for row in listed)
    dataset = ClipDataset.open(folder, sizes=[(80, 48)], num_frames=[5], fps=24.0)
    found = [dataset.load(0, 0, n, choice=0.0, crop_xy=CENTER) for n in range(2)]
    assert [(s.captions, read_numbers(s.frames)[0]) for s in found] == [(("good",), 0), (("dotted",), 10)]
    assert verify_shards(open_shards(folder)) == []

    packed = pack_clips(folder / "00000.tar", tmp_path / "packed")
    assert (packed.num_clips, packed.rejects) == (2, rejects)
    again = ClipDataset.open(tmp_path / "packed", sizes=[(80, 48)], num_frames=[5], fps=24.0)
    captions = {again.load(0, 0, n, choice=0.0, crop_xy=CENTER).captions for n in range(2)}
    assert captions == {("good",), ("dotted",)}


def test_an_index_of_nothing_says_why_in_words_and_lists_all(tmp_path: Path) -> None:
    add_members(tmp_path / "00000.tar", [("a.mp4", b"<html>"), ("b.mp4", b"<html>")])
    with pytest.raises(DataError) as caught:
        index_folder(tmp_path)
    assert "can be used (2 no_caption). First: 00000.tar: a: neither a txt" in str(caught.value)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2
    assert not list(tmp_path.glob("*.idx.npy"))
