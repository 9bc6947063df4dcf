"""Packing without encoding, in MB per CPU-second, against webdataset's ShardWriter and GNU tar."""

import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from measure import hardware, interleave, median_ratio, versions
from webdataset.writer import ShardWriter

from wan_dist.data.index import encode_index
from wan_dist.data.pack import pack_clips
from wan_dist.data.shard_format import Member, write_file, write_shard

CAPTION = b"a caption of about the length that people write for a clip of five seconds, give or take"
ROW = (160, 96, 81, 24.0, 3.4, 0.04)
"""Columns of the index that a probe would fill."""


def run(quick: bool) -> None:
    """Measure and print a table."""
    kinds = {"200 KB": (81, 200_000, 100 if quick else 1000), "8 MB": (240, 8_000_000, 8 if quick else 50)}
    print(f"{hardware()}; {versions('webdataset', 'av', 'zlib-ng')}; {_tar_version()}")
    print("MB per CPU-second, median; ratio of medians per round")
    print(f"| {'clips':>14} | {'contestant':<34} | MB/CPU-s | to ShardWriter | to GNU tar |")
    print("|---|---|---|---|---|")
    for name, (num_frames, size, count) in kinds.items():
        with tempfile.TemporaryDirectory(prefix="bench-pack-") as folder:
            clips = _write_clips(Path(folder) / "clips", num_frames, size, count)
            _report(f"{count} x {name}", clips, Path(folder) / "out", 2 if quick else 5)


def _report(title: str, clips: Path, out: Path, rounds: int) -> None:
    contestants: dict[str, Callable[[], object]] = {
        "wan_dist writer, SHA-256, CRC, index": partial(_write, clips, out),
        "wan-data pack, probing every clip": partial(_pack, clips, out),
        "webdataset ShardWriter": partial(_shard_writer, clips, out),
        "ShardWriter, then sha256sum": partial(_shard_writer_hashed, clips, out),
        "GNU tar": partial(_gnu_tar, clips, out),
    }
    total_mb = sum(path.stat().st_size for path in clips.iterdir()) / 1e6
    spent = interleave(contestants, rounds, partial(_empty, out))
    rates = {name: [total_mb / cost.cpu_s for cost in costs] for name, costs in spent.items()}
    for name, found in rates.items():
        ratios = [median_ratio(found, rates[peer]) for peer in ("webdataset ShardWriter", "GNU tar")]
        print(
            f"| {title:>14} | {name:<34} | {statistics.median(found):8.0f} | {ratios[0]:13.2f}x | {ratios[1]:9.2f}x |",
            flush=True,
        )


def _empty(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    os.sync()


def _write(clips: Path, out: Path) -> None:
    """What `wan-data pack` does apart from looking at the clips."""
    rows: list[tuple[Any, ...]] = []
    with write_shard(out / "data-000000.tar") as (writer, _):
        for path in sorted(clips.glob("*.mp4")):
            described = json.dumps({"path": path.name, "captions": [CAPTION.decode()], "fps": 24.0}).encode()
            with path.open("rb", buffering=0) as stream:
                members = [
                    writer.add(f"{path.stem}.json", len(described), io.BytesIO(described)),
                    writer.add(f"{path.stem}.txt", len(CAPTION), io.BytesIO(CAPTION)),
                    writer.add(path.name, os.fstat(stream.fileno()).st_size, stream),
                ]
            places = [value for m in [*members, Member(0, 0, 0)] for value in (m.offset, m.size, m.crc32)]  # no mask
            rows.append((path.stem.encode(), b"mp4", *places, *ROW))
    write_file(out / "data-000000.idx.npy", encode_index(rows))


def _pack(clips: Path, out: Path) -> None:
    pack_clips(clips, out)


def _shard_writer(clips: Path, out: Path) -> None:
    with ShardWriter(str(out / "data-%06d.tar"), maxcount=10**9, maxsize=10**12, verbose=0) as writer:
        for path in sorted(clips.glob("*.mp4")):
            described = {"path": path.name, "captions": [CAPTION.decode()], "fps": 24.0}
            writer.write({"__key__": path.stem, "json": described, "txt": CAPTION, "mp4": path.read_bytes()})


def _shard_writer_hashed(clips: Path, out: Path) -> None:
    """What it takes to know of a webdataset shard what the manifest knows."""
    _shard_writer(clips, out)
    for path in out.iterdir():
        with path.open("rb") as stream:
            hashlib.file_digest(stream, "sha256")


def _gnu_tar(clips: Path, out: Path) -> None:
    subprocess.run(["tar", "--format=ustar", "-cf", out / "data.tar", "-C", clips, "."], check=True)


def _tar_version() -> str:
    return subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _write_clips(folder: Path, num_frames: int, size: int, count: int) -> Path:
    """Real H.264 of about `size` bytes, so that probing reads as many packets as it would; copies differ in a tail."""
    folder.mkdir(parents=True)
    first = folder / "000000.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(first), "w") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=24))
        stream.width, stream.height, stream.pix_fmt = 320, 192, "yuv420p"
        stream.bit_rate = size * 8 * 24 // num_frames
        stream.options = {"preset": "ultrafast", "g": "48"}
        for _ in range(num_frames):
            noise = rng.integers(0, 255, (192, 320, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        container.mux(stream.encode())
    content = first.read_bytes()
    for number in range(count):
        tail = (16).to_bytes(4, "big") + b"free" + number.to_bytes(8, "big")
        (folder / f"{number:06d}.mp4").write_bytes(content + tail)
        (folder / f"{number:06d}.txt").write_bytes(CAPTION)
    return folder
