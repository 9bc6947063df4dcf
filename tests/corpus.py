"""Good, odd and broken clips, each with what packing must say about it."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, cast

import av
import numpy as np
from av.codec import CodecContext
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image

from tests.clips import draw_frame, write_clip, write_sound_only

X264: Final[dict[str, Any]] = {"preset": "ultrafast", "g": "12"}
HDR: Final = "colorprim=bt2020:colormatrix=bt2020nc:transfer="
FASTSTART: Final = {"movflags": "faststart"}


@dataclass(frozen=True)
class Case:
    """One file of the corpus.

    Attributes:
        name: file name.
        write: makes it.
        code: why `--verify decode` rejects it; empty if it is packed.
        warnings: what is said about it if it is packed.
        size: width and height as shown, px.
        num_frames: frames in it.
        unseen: the damage is only seen by decoding.
    """

    name: str
    write: Callable[[Path], Any]
    code: str = ""
    warnings: tuple[str, ...] = ()
    size: tuple[int, int] = (160, 96)
    num_frames: int = 24
    unseen: bool = field(default=False)


def clip(**options: Any) -> Callable[[Path], Any]:
    return lambda path: write_clip(path, 24, **options)


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def cut(keep: float, **options: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        data = write_clip(path, 60, **options).read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return write


def changed(before: bytes, after: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(write_clip(path, 24).read_bytes().replace(before, after))


def header_only(path: Path) -> None:
    data = write_clip(path, 24, container_options={"movflags": "frag_keyframe+empty_moov"}).read_bytes()
    path.write_bytes(data[: data.find(b"moof") - 4])


def corrupt(path: Path) -> None:
    """Overwrite part of the frame after the middle, leaving the container whole."""
    write_clip(path, 24, options={**X264, "bf": "0"})
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][14]
    data = bytearray(path.read_bytes())
    assert packet.pos is not None
    start, end = packet.pos + 8, packet.pos + packet.size
    data[start:end] = bytes((~byte) & 0xFF for byte in data[start:end])
    path.write_bytes(data)


def change_resolution(path: Path) -> None:
    """Two encoders, one stream: mpegts carries the size inside the stream."""
    with av.open(str(path), "w", format="mpegts") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=24))
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for part, size in enumerate(((160, 96), (96, 64))):
            encoder = cast(Any, CodecContext.create("libx264", "w"))
            encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
            encoder.time_base, encoder.framerate, encoder.options = Fraction(1, 24), Fraction(24), {**X264, "bf": "0"}
            frames = []
            for number in range(12):
                frame = av.VideoFrame.from_ndarray(draw_frame(number, *size), "rgb24").reformat(format="yuv420p")
                frame.pts = part * 12 + number
                frames.append(frame)
            for packet in [p for f in [*frames, None] for p in encoder.encode(f)]:
                packet.stream, packet.time_base = stream, Fraction(1, 24)
                container.mux(packet)


def two_videos(path: Path) -> None:
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((160, 96), (64, 48)):
            stream = cast(VideoStream, container.add_stream("libx264", rate=24))
            stream.width, stream.height, stream.pix_fmt, stream.options = *size, "yuv420p", {**X264}
            streams.append((stream, size))
        for stream, size in streams:
            for number in range(24):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(number, *size), "rgb24")))
            container.mux(stream.encode())


def cover_art(path: Path) -> None:
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        picture = cast(VideoStream, container.add_stream("mjpeg", rate=1))
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
        picture.disposition = Disposition.attached_pic
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, number * 1024
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
        container.mux(picture.encode(av.VideoFrame.from_ndarray(draw_frame(1, 64, 64), "rgb24")))
        container.mux(picture.encode())


def plain(level: int) -> Callable[[Path], Any]:
    """A clip in which every frame is the same gray."""

    def write(path: Path) -> None:
        with av.open(str(path), "w") as container:
            stream = cast(VideoStream, container.add_stream("libx264", rate=24))
            stream.width, stream.height, stream.pix_fmt, stream.options = 160, 96, "yuv420p", {**X264}
            for _ in range(24):
                picture = np.full((96, 160, 3), level, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            container.mux(stream.encode())

    return write


def png_bomb(width: int, height: int) -> bytes:
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 5) + b"IDATxxxxx\0\0\0\0"


def half_transparent(path: Path) -> None:
    Image.new("RGBA", (40, 20), (200, 100, 50, 128)).save(path)


GAP: Final = [*range(0, 480, 40), *range(2000, 2480, 40)]
VFR: Final = np.cumsum(np.random.default_rng(3).integers(20, 90, 24)).tolist()

CASES: Final = [
    Case("h264.mp4", clip()),
    Case("h264.mov", clip()),
    Case("open-gop.mp4", clip(options={**X264, "x264-params": "open-gop=1:keyint=12:bframes=3"})),
    Case("fragmented.mp4", clip(container_options={"movflags": "frag_keyframe+empty_moov"})),
    Case("hevc.mp4", clip(codec="libx265", options={"preset": "ultrafast", "x265-params": "log-level=none"})),
    Case("vp9.webm", clip(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})),
    Case("av1.mp4", clip(codec="libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"})),
    Case("mpeg4.avi", clip(codec="mpeg4", options={"g": "12"})),
    Case("b-frames.avi", clip(options={"preset": "medium", "g": "12", "bf": "3"})),
    Case("stream.ts", clip()),
    Case("vfr.mp4", clip(stamps_ms=VFR)),
    Case("rotated.mp4", clip(rotation=90), size=(96, 160)),
    Case("wide-pixels.mp4", clip(sample_aspect=Fraction(3, 2)), size=(240, 96)),
    Case("odd.mp4", clip(size=(161, 97), pix_fmt="yuv444p"), size=(161, 97)),
    Case("gray.mp4", clip(pix_fmt="gray")),
    Case("ten-bit.mp4", clip(pix_fmt="yuv420p10le")),
    Case("pq.mp4", clip(pix_fmt="yuv420p10le", options={**X264, "x264-params": HDR + "smpte2084"}), "hdr"),
    Case("hlg.mp4", clip(pix_fmt="yuv420p10le", options={**X264, "x264-params": HDR + "arib-std-b67"}), "hdr"),
    Case("interlaced.mp4", clip(options={**X264, "x264-params": "tff=1"}), warnings=("interlaced",)),
    Case("alpha.png", half_transparent, warnings=("alpha",), size=(40, 20), num_frames=1),
    Case("two-videos.mp4", two_videos, warnings=("several_videos",)),
    Case("gap.mp4", clip(stamps_ms=GAP), warnings=("time_gap",)),
    Case("black.mp4", plain(0), warnings=("black",)),
    Case("static.mp4", plain(128), warnings=("static",)),
    Case("tail.mkv", cut(0.7, options={**X264, "bf": "0"}), warnings=("missing_tail",), num_frames=-1),
    Case("zero.mp4", content(b""), "empty_file"),
    Case("page.mp4", content(b"<!DOCTYPE html><html>404</html>" * 50), "not_media"),
    Case("noise.mp4", content(np.random.default_rng(0).bytes(20_000)), "unknown_container"),
    Case("ftyp.mp4", content(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"), "truncated"),
    Case("no-moov.mp4", cut(0.5), "truncated"),
    Case("cut.mp4", cut(0.7, container_options=FASTSTART), "truncated"),
    Case("last-byte.mp4", cut(0.9999, container_options=FASTSTART), "truncated"),
    Case("corrupt.mp4", corrupt, "corrupt", unseen=True),
    Case("size-change.ts", change_resolution, "resolution_change", unseen=True),
    Case("same-stamps.mkv", clip(fps=3000, options={**X264, "bf": "0"}), "repeated_timestamps"),
    Case("sound.mp4", write_sound_only, "no_video"),
    Case("cover.mp4", cover_art, "no_video"),
    Case("new-codec.mp4", changed(b"avc1", b"zzzz"), "unknown_codec"),
    Case("askew.mp4", clip(rotation=45), "odd_rotation"),
    Case("header.mp4", header_only, "no_frames"),
    Case("tiny.mp4", clip(size=(8, 8)), "bad_frame_size"),
    Case("strip.mp4", clip(size=(1000, 20)), "bad_frame_size"),
    Case("bomb.png", content(png_bomb(60_000, 60_000)), "bad_frame_size"),
    Case("concat.mp4", content(b"ffconcat version 1.0\nfile h264.mp4\n"), "unknown_container"),
    Case("hls.mp4", content(b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"), "unknown_container"),
    Case("dash.mp4", content(b'<?xml version="1.0"?><MPD><BaseURL>http://127.0.0.1:9/</BaseURL></MPD>'), "not_media"),
    Case("sdp.mp4", content(b"v=0\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n"), "not_media"),
]


def write_corpus(folder: Path) -> Path:
    """Write every case with a caption beside it; return `folder`."""
    folder.mkdir(exist_ok=True)
    for case in CASES:
        case.write(folder / case.name)
        # The stem is not unique, and one caption serves all files of a stem.
        (folder / case.name).with_suffix(".txt").write_text(f"caption of {Path(case.name).stem}")
    return folder
