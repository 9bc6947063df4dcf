"""Cutting, encoding, filtering and other executors: exact, and the same bytes everywhere."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from tests.clips import BITS, read_numbers, write_clip
from tests.corpus import plain
from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import ConfigError, DataError
from wan_dist.data.decode import decode_clip
from wan_dist.data.index import open_shards
from wan_dist.data.pack import pack_clips
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.pack_state import LOCK_NAME
from wan_dist.data.reader import locate, read_json, read_member
from wan_dist.data.shard_format import MAX_KEY_LENGTH, sample_keys
from wan_dist.data.transcode import scaled_size

ROOT = Path(__file__).parents[3]


def write_scenes(path: Path, lengths: list[int], size: tuple[int, int] = (160, 96)) -> Path:
    """A clip whose top shows a still texture for each scene, and whose bottom shows the barcode of each frame."""
    rng = np.random.default_rng(5)
    scenes = [scene for scene, length in enumerate(lengths) for _ in range(length)]
    textures = [np.kron(rng.integers(0, 255, (6, 10, 3), np.uint8), np.ones((8, 16, 1), np.uint8)) for _ in lengths]
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=24))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"preset": "ultrafast", "g": "250", "sc_threshold": "0"}
        for number, scene in enumerate(scenes):
            picture = textures[scene].repeat(2, axis=0)
            bits = [(number >> bit) & 1 for bit in range(BITS)] + [1, 0]
            picture[80:] = np.array(bits, np.uint8).repeat(16)[None, :, None] * 200 + 20
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), "rgb24")))
        container.mux(stream.encode())
    return path


def folder_of_clips(folder: Path, names: list[str], num_frames: int = 24) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        write_clip(folder / f"{name}.mp4", num_frames, first=number)
        (folder / f"{name}.txt").write_text(f"caption {name}")
    return folder


def samples(out: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    shards = open_shards(out)
    found: dict[str, tuple[dict[str, Any], bytes]] = {}
    for shard in range(len(shards.manifest.shards)):
        for row in shards.index(shard):
            described, media = (locate(shards.tar_path(shard), row, member) for member in ("json", "media"))
            found[row["key"].decode()] = read_json(described), read_member(media)
    return found


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != LOCK_NAME}


def codes(out: Path, name: str = "rejects") -> dict[str, str]:
    return {r["path"]: r["code"] for r in map(json.loads, (out / f"{name}.jsonl").read_text().splitlines())}


def test_encoded_clips_have_the_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", list("abcde"), 30)
    rules = ClipRules(transcode="480p", max_clip_s=0.6)
    one = pack_clips(clips, tmp_path / "one", rules=rules, shard_clips=2)
    three = pack_clips(clips, tmp_path / "three", rules=rules, shard_clips=2, num_workers=3)
    assert one == three
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert one.num_clips == 15


@pytest.mark.skipif(importlib.util.find_spec("scenedetect") is None, reason="PySceneDetect is not installed")
def test_scenes_are_cut_between_two_frames(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    write_scenes(clips / "film.mp4", [30, 25, 41])
    (clips / "film.txt").write_text("x")
    assert pack_clips(clips, tmp_path / "out", rules=ClipRules(scene_split=True)).num_clips == 3
    found = samples(tmp_path / "out")
    assert list(found) == ["film-p0000", "film-p0001", "film-p0002"]
    for (described, media), (first, length) in zip(found.values(), [(0, 30), (30, 25), (55, 41)], strict=True):
        assert described["num_frames"] == length
        assert described.get("start_s", 0) == pytest.approx(first / 24)
        frames = decode_clip(media, Bucket(160, 96, length), fps=24)
        assert read_numbers(frames[:, 84:92]) == list(range(first, first + length))


def test_a_clip_with_nothing_to_cut_keeps_its_bytes(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a"])
    pack_clips(clips, tmp_path / "out", rules=ClipRules(max_clip_s=1.0, verify="decode"))
    assert samples(tmp_path / "out")["a-p0000"][1] == (clips / "a.mp4").read_bytes()


@pytest.mark.parametrize(("seconds", "lengths"), [(0.5, [12, 12]), (0.4, [8, 8, 8]), (0.99, [12, 12]), (0.3, [6] * 4)])
def test_long_clips_are_cut_into_equal_parts(tmp_path: Path, seconds: float, lengths: list[int]) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a"])
    pack_clips(clips, tmp_path / "out", rules=ClipRules(max_clip_s=seconds))
    numbers: list[int] = []
    for described, media in samples(tmp_path / "out").values():
        assert described["duration_s"] <= seconds + 1e-6
        numbers += read_numbers(decode_clip(media, Bucket(160, 96, described["num_frames"]), fps=24))
    assert [d["num_frames"] for d, _ in samples(tmp_path / "out").values()] == lengths
    assert numbers == list(range(24))


def test_keys_of_pieces_meet_no_other_key() -> None:
    paths = ["a.mp4", "a-p0000.mp4", "b" * 100 + ".mp4", "c" * MAX_KEY_LENGTH + ".mp4"]
    keys = sample_keys(paths, with_pieces=True)
    pieces = [f"{key}-p{number:04d}" for key in keys.values() for number in range(3)]
    assert len(set(pieces)) == len(pieces)
    assert max(map(len, pieces)) <= MAX_KEY_LENGTH


def test_filters_leave_out_what_is_unwanted(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["good"])
    plain(0)(clips / "black.mp4")
    plain(128)(clips / "static.mp4")
    write_clip(clips / "small.mp4", 24, size=(64, 48))
    write_clip(clips / "short.mp4", 5)
    write_clip(clips / "long.mp4", 60)
    for path in clips.glob("*.mp4"):
        path.with_suffix(".txt").write_text("x")
    rules = ClipRules(drop_black=True, drop_static=True, min_side_px=90, min_seconds=0.5, max_seconds=2.0)
    pack_clips(clips, tmp_path / "out", rules=rules)
    assert list(samples(tmp_path / "out")) == ["good"]
    wanted = {"black": "black", "static": "static", "small": "too_small", "short": "too_short", "long": "too_long"}
    assert codes(tmp_path / "out") == {f"{name}.mp4": code for name, code in wanted.items()}


def test_repeated_content_is_told_or_dropped(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a", "b", "c"])
    shutil.copy(clips / "a.mp4", clips / "c.mp4")
    told = pack_clips(clips, tmp_path / "told", shard_clips=1)
    assert (told.num_clips, told.warnings) == (3, {"same_content": 1})
    assert codes(tmp_path / "told", "warnings") == {"c.mp4": "same_content"}
    dropped = pack_clips(clips, tmp_path / "dropped", drop_duplicates=True)
    assert (dropped.num_clips, dropped.rejects) == (2, {"same_content": 1})
    assert "a.mp4" in (tmp_path / "dropped" / "rejects.jsonl").read_text()


def test_long_captions_are_reported(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a", "b", "c"])
    (clips / "b.txt").write_text("word " * 600)
    (clips / "c.txt").write_text("a" * 600)
    assert pack_clips(clips, tmp_path / "estimated").warnings == {"long_caption": 1}
    from tokenizers import Tokenizer, models

    letters = Tokenizer(models.BPE(vocab={"a": 0, "w": 1}, merges=[]))
    letters.save(str(tmp_path / "tokenizer.json"))
    pack_clips(clips, tmp_path / "counted", tokenizer_path=tmp_path)
    assert set(codes(tmp_path / "counted", "warnings")) == {"b.mp4", "c.mp4"}
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        pack_clips(clips, tmp_path / "none", tokenizer_path=clips)


def test_a_caption_of_any_length_costs_only_a_warning(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a", "b"])
    for name in "ab":
        (clips / f"{name}.txt").unlink()
    (clips / "metadata.csv").write_text(f'file,caption\na.mp4,short\nb.mp4,"{"long, " * 30_000}"\n')
    result = pack_clips(clips, tmp_path / "shards")
    assert (result.num_clips, result.rejects, result.warnings) == (2, {}, {"long_caption": 1})


def test_other_rules_are_other_shards(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a"])
    pack_clips(clips, tmp_path / "out")
    with pytest.raises(DataError, match=r"transcode.*--restart"):
        pack_clips(clips, tmp_path / "out", rules=ClipRules(transcode="480p"))


def test_scaled_size_covers_every_shape_of_the_area() -> None:
    assert scaled_size(1920, 1080, (832, 480)) == (854, 480)
    assert scaled_size(1440, 1080, (832, 480)) == (730, 548)
    assert scaled_size(1080, 1920, (832, 480)) == (480, 854)
    assert scaled_size(640, 360, (832, 480)) == (640, 360)
    assert scaled_size(161, 97, None) == (162, 98)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'wan_dist[ray]'")
def test_a_ray_cluster_writes_the_same_bytes(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", list("abcd"), 12)
    (clips / "e.mp4").write_bytes(b"")
    (clips / "e.txt").write_text("x")
    pack_clips(clips, tmp_path / "here", shard_clips=2)
    # A process of its own: a cluster's daemons and signal handlers would stay in this one.
    command = [sys.executable, "-m", "data_tools", "pack", clips, tmp_path / "ray", "--shard-clips", "2", "--json"]
    command += ["--executor", "ray", "--workers", "2"]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rejects"] == {"empty_file": 1}
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


FULL_DISK = """
mount -t tmpfs -o size=1m none "$2" || exit 77
mkdir "$2/other" && head -c "$3" /dev/zero > "$2/other/file"
"$0" -m data_tools pack "$1" "$2/out" $4; status=$?
ls -A "$2/out" >&2
exit $status
"""


@pytest.mark.parametrize(("taken_bytes", "options"), [(0, ""), (1_000_000, "--max-clip-seconds 1")])
def test_a_full_disk_is_one_line_and_leaves_no_half_shard(tmp_path: Path, taken_bytes: int, options: str) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        write_clip(clips / f"{number}.mp4", 60)
        with (clips / f"{number}.mp4").open("ab") as stream:  # a free box that players skip
            stream.write((800_000).to_bytes(4, "big") + b"free" + rng.bytes(799_992))
        (clips / f"{number}.txt").write_text("x")
    (tmp_path / "out").mkdir()
    # A file system of its own needs a user namespace, which some machines forbid.
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, sys.executable, clips, tmp_path / "out"]
    command += [str(taken_bytes), options]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system of 1 MB can be made here: {done.stderr.strip()}")
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "give the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert ".tar" not in done.stderr.splitlines()[-1]
    assert not {"data-000000.tar", "manifest.json"} & set(done.stderr.split())


def test_without_verifying_headers_are_believed(tmp_path: Path) -> None:
    clips = folder_of_clips(tmp_path / "clips", ["a", "b"])
    write_clip(clips / "turned.mkv", 12, rotation=90)
    write_clip(clips / "cut.mp4", 60, container_options={"movflags": "faststart"})
    content = (clips / "cut.mp4").read_bytes()
    (clips / "cut.mp4").write_bytes(content[: int(len(content) * 0.8)])
    for name in ("turned", "cut"):
        (clips / f"{name}.txt").write_text(name)
    pack_clips(clips, tmp_path / "probed")
    pack_clips(clips, tmp_path / "believed", rules=ClipRules(verify="none"))
    probed, believed = samples(tmp_path / "probed"), samples(tmp_path / "believed")
    # Whole clips are described alike, the stamps of mkv included, which has no count in its header.
    for path in probed:
        assert believed[path] == probed[path]
    assert set(believed) - set(probed) == {"cut"}
    assert believed["cut"][0]["num_frames"] == 60


def test_a_pack_of_rejects_only_leaves_no_shards(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"")
    (clips / "a.txt").write_text("nothing")
    with pytest.raises(DataError, match="every clip was rejected"):
        pack_clips(clips, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {LOCK_NAME, "plan.json", "rejects.jsonl"}
    # Mended, the same command goes through.
    write_clip(clips / "a.mp4", 12)
    assert pack_clips(clips, tmp_path / "out", restart=True).num_clips == 1
