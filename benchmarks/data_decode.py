"""Decode and resize 81 frames of a 720p clip, against decord and torchcodec where they are installed.

Both are used nowhere else, so they are no dependencies: `pip install --no-deps --target /tmp/peers decord
'torchcodec==0.13.*'` (the latest that runs with a CPU build of torch; it needs FFmpeg's shared libraries, in Debian
`apt install libavdevice59 libavfilter8`), and run `PYTHONPATH=.:/tmp/peers python benchmarks/data.py decode`.
"""

import tempfile
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from measure import hardware, interleave, median_ratio, versions

from wan_dist.core.buckets import Bucket
from wan_dist.data.decode import decode_clip
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.timing import choose_frames

WIDTH, HEIGHT, FPS = 1280, 720, 30
BUCKET = Bucket(832, 464, 81)
TARGET_FPS = 16.0
BITS = 8
Frames = np.ndarray


def run(quick: bool) -> None:
    """Measure and print a table."""
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as folder:
        path = _write_clip(Path(folder) / "clip.mp4", 180 if quick else 240)
        wanted = choose_frames(np.arange(180 if quick else 240) / FPS, BUCKET.num_frames, TARGET_FPS, 0.0, False)
        contestants: dict[str, Callable[[], Frames]] = {
            "wan_dist": lambda: _ours(path),
            "wan_dist, in a process": lambda: _apart(path),
        }
        contestants |= {name: peer(path, wanted) for name, peer in PEERS.items() if find_spec(name)}
        peers = [name for name in PEERS if name in contestants]
        print(f"{hardware()}; {versions('av', *peers)}")
        size = f"{BUCKET.width}x{BUCKET.height}"
        print(f"{BUCKET.num_frames} frames of {WIDTH}x{HEIGHT} h264 at {TARGET_FPS:g} fps to {size}, one thread")
        wrong = {
            name: sum(a != b for a, b in zip(_read(work()), wanted, strict=True)) for name, work in contestants.items()
        }
        spent = interleave(contestants, 3 if quick else 7)
        cpu = {name: [cost.cpu_s for cost in costs] for name, costs in spent.items()}
        print("| contestant | CPU-s, median | of wan_dist's | wrong frames |")
        print("|---|---|---|---|")
        for name, found in cpu.items():
            ratio = median_ratio(found, cpu["wan_dist"])
            print(f"| {name} | {sorted(found)[len(found) // 2]:.2f} | {ratio:.2f}x | {wrong[name]} |", flush=True)


def _ours(path: Path) -> Frames:
    return decode_clip(path.read_bytes(), BUCKET, fps=TARGET_FPS)


def _apart(path: Path) -> Frames:
    """Includes the start of the process, which a training run pays once."""
    decoder = open_decoder("process")
    try:
        options: dict[str, Any] = {
            "fps": TARGET_FPS,
            "choice": 0.0,
            "crop_xy": (0.5, 0.5),
            "allow_duplicate_frames": False,
        }
        return decoder.decode(path.read_bytes(), BUCKET, **options)
    finally:
        decoder.close()


def _decord(path: Path, wanted: np.ndarray) -> Callable[[], Frames]:
    def work() -> Frames:
        from decord import VideoReader, cpu  # pyright: ignore[reportMissingImports]

        reader = VideoReader(str(path), ctx=cpu(0), width=BUCKET.width, height=BUCKET.height, num_threads=1)
        return reader.get_batch(wanted).asnumpy()

    return work


def _torchcodec(path: Path, wanted: np.ndarray) -> Callable[[], Frames]:
    def work() -> Frames:
        from torch.nn.functional import interpolate
        from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

        decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
        frames = decoder.get_frames_at(wanted.tolist()).data.permute(0, 3, 1, 2)
        # On bytes, channels last: a fifth of what floats take.
        resized = interpolate(frames, (BUCKET.height, BUCKET.width), mode="bicubic", antialias=True)
        return resized.permute(0, 2, 3, 1).numpy()

    return work


PEERS = {"decord": _decord, "torchcodec": _torchcodec}


def _write_clip(path: Path, num_frames: int) -> Path:
    """Write moving noise with each frame's number as a barcode over its upper half."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 16, WIDTH // 16 + num_frames, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "veryfast", "crf": "23"}
        for number in range(num_frames):
            image = np.repeat(np.repeat(noise[:, number : number + WIDTH // 16], 16, 0), 16, 1)
            bits = np.array([(number >> bit) & 1 for bit in range(BITS)], np.uint8)
            image[: HEIGHT // 2] = (bits[np.arange(WIDTH) * BITS // WIDTH] * 200 + 20)[None, :, None]
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _read(frames: Frames) -> list[int]:
    """Return the number in the barcode of each frame."""
    _, height, width, _ = frames.shape
    centres = ((np.arange(BITS) + 0.5) * width / BITS).astype(int)
    bits = frames[:, height // 4, centres].mean(2) > 120
    return (bits << np.arange(BITS)).sum(1).tolist()
