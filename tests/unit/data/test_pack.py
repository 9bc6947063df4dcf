"""Packing: the same bytes for any number of workers, resumable after a kill, nothing lost without a reason."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.clips import write_clip
from wan_dist.core.errors import DataError
from wan_dist.data.index import open_shards
from wan_dist.data.pack import PackProgress, pack_clips
from wan_dist.data.pack_state import LOCK_NAME


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips, of which one is no video and one has no caption."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(12):
        path = folder / f"{number:02}.mp4"
        if number == 3:
            path.write_bytes(b"<html>not found</html>")
        else:
            write_clip(path, 5 + number)
        if number != 7:
            path.with_suffix(".txt").write_text(f"caption {number}")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != LOCK_NAME
    }


def test_any_number_of_workers_writes_the_same_bytes(clips: Path, tmp_path: Path) -> None:
    one = pack_clips(clips, tmp_path / "one", shard_clips=2, num_workers=1)
    three = pack_clips(clips, tmp_path / "three", shard_clips=2, num_workers=3)
    assert one == three
    assert (one.num_clips, one.num_shards, one.rejects) == (10, 6, {"no_caption": 1, "not_media": 1})
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_rejects_are_listed_and_move_no_other_clip(clips: Path, tmp_path: Path) -> None:
    pack_clips(clips, tmp_path, shard_clips=4)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["path"], r["code"]) for r in rejects] == [("03.mp4", "not_media"), ("07.mp4", "no_caption")]
    assert all(r["hint"] for r in rejects)
    shards = open_shards(tmp_path)
    assert [[row["key"].decode() for row in shards.index(s)] for s in range(3)] == [
        ["00", "01", "02"],
        ["04", "05", "06", "08"],
        ["09", "10", "11"],
    ]


def test_progress_counts_every_clip(clips: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, Counter[str]]] = []

    def note(state: PackProgress) -> None:
        seen.append((state.done_clips, state.rejects.copy()))

    pack_clips(clips, tmp_path, shard_clips=2, num_workers=2, progress=note)
    assert [done for done, _ in seen] == list(range(12))
    assert seen[-1][1] == {"no_caption": 1, "not_media": 1}


def test_killed_pack_resumes_to_identical_bytes(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    one = write_clip(clips / "000.mp4", 60).read_bytes()
    for number in range(150):
        (clips / f"{number:03}.mp4").write_bytes(one)
        (clips / f"{number:03}.txt").write_text(f"caption {number}")
    straight = pack_clips(clips, tmp_path / "straight", shard_clips=3)

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "data_tools", "pack", str(clips), str(out), "--shard-clips", "3", "--workers", "2"]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "data-000002.tar").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed; use more clips"
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="has not finished"):
        open_shards(out)

    resumed = pack_clips(clips, out, shard_clips=3)
    assert 0 < resumed.resumed_shards < 50
    assert resumed.digest == straight.digest
    assert contents(out) == contents(tmp_path / "straight")


def test_packing_again_changes_nothing(clips: Path, tmp_path: Path) -> None:
    pack_clips(clips, tmp_path, shard_clips=2)
    before = contents(tmp_path)
    written = (tmp_path / "data-000000.tar").stat().st_mtime_ns
    assert pack_clips(clips, tmp_path, shard_clips=2).resumed_shards == 6
    assert contents(tmp_path) == before
    assert (tmp_path / "data-000000.tar").stat().st_mtime_ns == written


def test_a_lost_or_cut_shard_is_written_again(clips: Path, tmp_path: Path) -> None:
    pack_clips(clips, tmp_path, shard_clips=2)
    before = contents(tmp_path)
    (tmp_path / "data-000001.tar").unlink()
    os.truncate(tmp_path / "data-000004.tar", 512)
    (tmp_path / ".data-000002.tar.tmp.123").write_bytes(b"left by a killed writer")
    assert pack_clips(clips, tmp_path, shard_clips=2).resumed_shards == 4
    assert contents(tmp_path) == before


def test_a_shard_that_changed_before_a_resume_is_written_again(
    clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack_clips(clips, tmp_path, shard_clips=2)
    before = contents(tmp_path)
    (tmp_path / "manifest.json").unlink()  # as if killed
    for name in ("data-000001.tar", "data-000003.idx.npy"):
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / name).write_bytes(content)
    assert pack_clips(clips, tmp_path, shard_clips=2, num_workers=2).resumed_shards == 4
    assert contents(tmp_path) == before
    assert "changed since it was written (data-000001.tar); packing it again" in caplog.text


def test_a_folder_under_repair_does_not_look_whole(clips: Path, tmp_path: Path) -> None:
    pack_clips(clips, tmp_path, shard_clips=2)
    (tmp_path / "data-000001.tar").unlink()

    def interrupt(state: PackProgress) -> None:
        if state.done_clips == state.num_clips:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_clips(clips, tmp_path, shard_clips=2, progress=interrupt)
    with pytest.raises(DataError, match="has not finished"):
        open_shards(tmp_path)


def test_changed_input_is_refused_without_restart(clips: Path, tmp_path: Path) -> None:
    pack_clips(clips, tmp_path, shard_clips=4)
    with pytest.raises(DataError, match=r"options .*4.* -> .*5.*--restart"):
        pack_clips(clips, tmp_path, shard_clips=5)
    captions = tmp_path.parent / "captions.jsonl"
    captions.write_text('{"file": "00.mp4", "caption": "only"}')
    with pytest.raises(DataError, match="num_clips 11 -> 1"):
        pack_clips(clips, tmp_path, shard_clips=4, captions_path=captions)
    assert pack_clips(clips, tmp_path, shard_clips=4, captions_path=captions, restart=True).num_clips == 1
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["data-000000.tar"]


def test_foreign_shards_are_not_touched(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "other.tar").write_bytes(b"")
    with pytest.raises(DataError, match="did not write"):
        pack_clips(clips, tmp_path, restart=True)


def test_two_packers_do_not_share_a_folder(clips: Path, tmp_path: Path) -> None:
    with (tmp_path / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another `wan-data pack`"):
            pack_clips(clips, tmp_path)
    pack_clips(clips, tmp_path)


def test_a_clip_that_changes_meanwhile_stops_packing(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(3):
        write_clip(folder / f"{number}.mp4", 5)
        (folder / f"{number}.txt").write_text("x")

    def grow(state: PackProgress) -> None:
        if state.done_clips == 1:
            write_clip(folder / "2.mp4", 9)

    with pytest.raises(DataError, match=r"2\.mp4: changed while it was packed"):
        pack_clips(folder, tmp_path / "out", progress=grow)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_nothing_usable_is_one_line_with_reasons(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"")
    (folder / "a.txt").write_text("x")
    (folder / "b.mp4").write_bytes(b"1")
    with pytest.raises(DataError, match=r"every clip was rejected \(1 empty_file, 1 no_caption\)") as caught:
        pack_clips(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out" / "rejects.jsonl").read_text().count("\n") == 2
    assert not (tmp_path / "out" / "manifest.json").exists()
