"""Probing says what a file holds, and gives a reason for every bad one."""

import resource
import struct
import subprocess
import sys
import threading
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests.clips import REAL_CLIPS, write_clip, write_sound_only
from wan_dist.core.buckets import Bucket
from wan_dist.data.decode import decode_clip
from wan_dist.data.probe import ClipInfo, Reject, probe_clip
from wan_dist.data.probe_worker import Prober
from wan_dist.data.spans import FileSpan


def good(path: Path) -> ClipInfo:
    info = probe_clip(path, path.name)
    assert isinstance(info, ClipInfo), info
    return info


def test_real_frames_rate_and_size(tmp_path: Path) -> None:
    info = good(write_clip(tmp_path / "a.mp4", 30, fps=24))
    assert (info.width, info.height, info.num_frames, info.fps) == (160, 96, 30, pytest.approx(24))
    assert info.duration_s == pytest.approx(30 / 24)
    turned = good(write_clip(tmp_path / "turned.mp4", 2, rotation=90))
    assert (turned.width, turned.height, turned.rotation) == (96, 160, 90)
    wide = good(write_clip(tmp_path / "wide.mp4", 2, sample_aspect=Fraction(3, 2)))
    assert (wide.width, wide.height) == (240, 96)


def test_variable_rate_reports_mean_and_longest_gap(tmp_path: Path) -> None:
    info = good(write_clip(tmp_path / "vfr.mp4", 5, stamps_ms=[0, 40, 80, 480, 500]))
    assert info.fps == pytest.approx(8)
    assert info.max_gap_s == pytest.approx(0.4, abs=1e-3)


def test_image_is_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (33, 21)).save(tmp_path / "a.png")
    assert good(tmp_path / "a.png") == ClipInfo(33, 21, 1, 0.0, 0.0, 0.0, 0)
    for lossless in (False, True):
        Image.new("RGB", (33, 21)).save(tmp_path / "a.webp", lossless=lossless)
        assert good(tmp_path / "a.webp").width == 33
    turned = Image.Exif()
    turned[0x112] = 6  # by a quarter, as cameras held upright say
    Image.new("RGB", (33, 21)).save(tmp_path / "a.jpg", exif=turned)
    info = good(tmp_path / "a.jpg")
    assert (info.width, info.height, info.rotation) == (21, 33, -90)


def bad_files(folder: Path) -> dict[str, tuple[bytes, str]]:
    whole = write_clip(folder / "whole.mp4", 30, container_options={"movflags": "faststart"}).read_bytes()
    late = write_clip(folder / "late.mp4", 30).read_bytes()
    start, end = late.find(b"mdat") + 4, late.rfind(b"moov") - 4
    return {
        "filled.mp4": (late[:start] + b"\xff" * (end - start) + late[end:], "undecodable"),
        "zero.mp4": (b"", "empty_file"),
        "page.mp4": (b"<!DOCTYPE html><html>404</html>" * 50, "not_media"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not_media"),
        "noise.mp4": (bytes(range(256)) * 40, "unknown_container"),
        "playlist.mp4": (b"ffconcat version 1.0\nfile whole.mp4\n", "unknown_container"),
        "no-moov.mp4": (late[: len(late) // 2], "truncated"),
        "cut.mp4": (whole[:-300], "truncated"),
        "cut-half.mp4": (whole[: len(whole) // 2], "truncated"),
        "sound.mp4": (write_sound_only(folder / "s.mp4").read_bytes(), "no_video"),
    }


def test_bad_files_are_rejected_with_code_and_hint(tmp_path: Path) -> None:
    for name, (content, code) in bad_files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        found = probe_clip(tmp_path / name, name)
        assert isinstance(found, Reject), name
        assert (found.code, found.path) == (code, name), found
        assert found.hint
        assert "Errno" not in found.hint
    missing = probe_clip(tmp_path / "gone.mp4", "gone.mp4")
    assert isinstance(missing, Reject)
    assert missing.code == "missing_file"


def without_stamps(stream: bytes) -> bytes:
    """Clear the time stamps of all but the first frame of an MPEG transport stream (ISO 13818-1, 2.4.3.7)."""
    content, num_frames = bytearray(stream), 0
    for packet in range(0, len(content) - 187, 188):
        start = content.find(b"\0\0\1\xe0", packet, packet + 188)
        if content[packet + 1] & 0x40 and start >= 0:
            num_frames += 1
            if num_frames > 1:
                content[start + 7] &= 0x3F  # flags: no PTS, no DTS; their bytes become stuffing
                content[start + 9 : start + 9 + content[start + 8]] = b"\xff" * content[start + 8]
    return bytes(content)


def test_frames_without_time_stamps_are_rejected(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "a.ts", 12, options={"bf": "0", "preset": "ultrafast"}).read_bytes()
    assert isinstance(probe_clip(whole, "a.ts"), ClipInfo)
    found = probe_clip(without_stamps(whole), "a.ts")
    assert isinstance(found, Reject)
    assert found.code == "no_timestamps"


def test_what_needs_other_handling_is_named(tmp_path: Path) -> None:
    hdr = {"preset": "ultrafast", "x264-params": "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"}
    path = write_clip(tmp_path / "hdr.mp4", 2, pix_fmt="yuv420p10le", options=hdr)
    found = probe_clip(path, "hdr.mp4")
    assert isinstance(found, Reject)
    assert found.code == "hdr"


def test_a_small_file_cannot_ask_for_a_huge_picture(tmp_path: Path) -> None:
    header = struct.pack(">4sIIBBBBB", b"IHDR", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    for tail in (b"", b"\0\0\0\5IDAT" + b"x" * 100):
        assert isinstance(probe_clip(png + tail, "bomb.png"), Reject)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # The picture would have 10 GiB.
    assert peak_mib < 4096


def test_every_cut_of_a_clip_is_noticed(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "a.mp4", 24, container_options={"movflags": "faststart"}).read_bytes()
    assert isinstance(probe_clip(whole, "a"), ClipInfo)
    for size in range(0, len(whole) - 1, len(whole) // 60):
        assert isinstance(probe_clip(whole[:size], "a"), Reject), size
    # Cut between two frames nothing in the file is damaged, there is only less of it.
    with av.open(str(tmp_path / "a.mp4")) as container:
        starts = sorted(p.pos for p in container.demux(video=0) if p.size and p.pos is not None)
    assert all(isinstance(probe_clip(whole[:start], "a"), Reject) for start in starts)


def test_prober_survives_crash_and_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashing_probe.py").write_text("import os, sys; sys.stdin.readline(); os.abort()")
    (tmp_path / "hanging_probe.py").write_text("import signal; signal.pause()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    clip = write_clip(tmp_path / "a.mp4", 3)
    with Prober(module="crashing_probe") as prober:
        for _ in range(2):
            found = prober.probe(FileSpan(clip), "a.mp4")
            assert isinstance(found, Reject)
            assert found.code == "probe_crash"
    with Prober(timeout_s=0.2, module="hanging_probe") as prober:
        found = prober.probe(FileSpan(clip), "a.mp4")
        assert isinstance(found, Reject)
        assert found.code == "probe_timeout"


def test_prober_answers_as_the_function_does(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "ä b.mp4", 3)
    (tmp_path / "bad.mp4").write_bytes(b"x")
    with Prober() as prober:
        assert prober.probe(FileSpan(clip), clip.name) == probe_clip(clip, clip.name)
        assert prober.probe(FileSpan(tmp_path / "bad.mp4"), "bad.mp4") == probe_clip(tmp_path / "bad.mp4", "bad.mp4")


def test_probing_does_not_load_torch() -> None:
    code = "import sys, wan_dist.data.probe_worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_many_files_leave_no_threads_behind(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 3)
    before = threading.active_count(), len(list(Path("/proc/self/task").iterdir()))
    for _ in range(30):
        good(clip)
    assert (threading.active_count(), len(list(Path("/proc/self/task").iterdir()))) == before


@pytest.mark.skipif(not REAL_CLIPS.is_dir(), reason=f"the real clips are not at {REAL_CLIPS}")
def test_real_clips() -> None:
    found = {path.name: good(path) for path in sorted(REAL_CLIPS.glob("*.mp4"))}
    assert {name: (i.width, i.height, round(i.fps), i.num_frames) for name, i in found.items()} == {
        "crush-027.mp4": (832, 480, 16, 114),
        "crush-030.mp4": (832, 480, 16, 146),
        "crush-034.mp4": (832, 480, 16, 127),
        "hiker.mp4": (720, 480, 8, 49),
    }


def test_frames_that_share_a_stamp_are_rejected(tmp_path: Path) -> None:
    # Matroska counts milliseconds, so frames at 3000 per second collide.
    path = write_clip(tmp_path / "dup.mkv", 12, fps=3000, options={"preset": "ultrafast", "bf": "0"})
    found = probe_clip(path, "dup.mkv")
    assert isinstance(found, Reject)
    assert found.code == "repeated_timestamps"


def test_a_matroska_file_that_starts_late_lacks_no_tail(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "late.mkv", 48, stamps_ms=[5000 + 40 * n for n in range(48)])
    with av.open(str(path)) as container:
        assert container.start_time == 5_000_000
    assert good(path).warnings == ()


def test_an_animated_webp_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "moving.webp"
    frames = [Image.new("RGB", (32, 32), (40 * n, 0, 0)) for n in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    found = probe_clip(path, "moving.webp")
    assert isinstance(found, Reject)
    assert (found.code, found.hint) == (
        "unknown_codec",
        "an animated WebP, which FFmpeg cannot decode; transcode to mp4",
    )


def test_a_cmyk_jpeg_is_opaque(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    Image.new("CMYK", (32, 32), (0, 200, 200, 30)).save(path)
    assert good(path).warnings == ()
    # Within what coding and rounding of the two conversions move.
    wanted = np.asarray(Image.open(path).convert("RGB"), np.int16)
    assert np.abs(decode_clip(path, Bucket(32, 32, 1), fps=1)[0] - wanted).max() <= 4
