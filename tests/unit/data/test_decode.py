"""Decoding returns the right frames, upright and in shape, whatever the file is like."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from tests.clips import draw_frame, read_number, read_numbers, write_clip
from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.decode import crop_window, decode_clip
from wan_dist.data.timing import choose_frames

SMALL = {"g": "12", "bf": "2", "preset": "ultrafast"}
KINDS = {
    "h264.mp4": {},
    "h264-open-gop.mp4": {"options": {**SMALL, "x264-params": "open-gop=1:keyint=12:bframes=3"}},
    "h264.mkv": {},
    "h264.ts": {},
    "one-keyframe.ts": {"options": {**SMALL, "g": "1000"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "keyint=12:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "one-keyframe.mp4": {"options": {**SMALL, "g": "1000"}},
}


@pytest.mark.parametrize("name", KINDS)
def test_random_access_returns_the_right_frames(tmp_path: Path, name: str) -> None:
    path = write_clip(tmp_path / name, 60, **KINDS[name])
    # Matroska rounds stamps to milliseconds, so nominal stamps may differ from the file's by one frame at ties.
    with av.open(str(path)) as container:
        stamps = np.array([frame.time for frame in container.decode(video=0)])
    stamps -= stamps[0]
    rng = np.random.default_rng(1)
    for fps in (24, 16, 10):
        for choice in rng.random(4):
            frames = decode_clip(path, Bucket(80, 48, 9), fps=fps, choice=choice)
            assert frames.shape == (9, 48, 80, 3)
            assert read_numbers(frames) == choose_frames(stamps, 9, fps, choice, False).tolist()


def test_bytes_and_path_give_the_same_pixels(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 30)
    bucket = Bucket(80, 48, 5)
    np.testing.assert_array_equal(
        decode_clip(path, bucket, fps=24, choice=0.7), decode_clip(path.read_bytes(), bucket, fps=24, choice=0.7)
    )


def test_variable_frame_rate_is_followed_by_stamps(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    stamps = np.concatenate([[0], np.cumsum(rng.integers(20, 90, 59))])
    path = write_clip(tmp_path / "vfr.mp4", 60, stamps_ms=stamps.tolist())
    for choice in (0.0, 0.4, 0.9):
        frames = decode_clip(path, Bucket(80, 48, 13), fps=12, choice=choice)
        assert read_numbers(frames) == choose_frames(stamps / 1000, 13, 12, choice, False).tolist()


def test_consecutive_frames_follow_each_other_whatever_their_times(tmp_path: Path) -> None:
    stamps = np.concatenate([[0], np.cumsum(np.random.default_rng(4).integers(10, 200, 39))])
    path = write_clip(tmp_path / "vfr.mp4", 40, stamps_ms=stamps.tolist())
    for choice, first in ((0.0, 0), (0.5, 14), (0.999, 27)):
        frames = decode_clip(path, Bucket(80, 48, 13), fps=9.5, choice=choice, consecutive=True)
        assert read_numbers(frames) == list(range(first, first + 13))
    with pytest.raises(DataError, match="too_short"):
        decode_clip(path, Bucket(80, 48, 41), fps=9.5, consecutive=True)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path: Path, rotation: int) -> None:
    path = write_clip(tmp_path / "turned.mp4", 20, rotation=rotation, first=5)
    shape = Bucket(160, 96, 3) if rotation == 180 else Bucket(96, 160, 3)
    frames = decode_clip(path, shape, fps=24, choice=0.9)
    # FFmpeg's display matrix turns counter-clockwise; turned back, the barcode reads from left to right again.
    assert read_numbers(np.rot90(frames, -rotation // 90, axes=(1, 2))) == [20, 21, 22]
    assert read_number(frames[0]) != 20


def test_pixel_aspect_is_applied(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "wide.mp4", 3, size=(160, 96), sample_aspect=Fraction(3, 2))
    # Shown as 240x96: covering 120x48 keeps all of it, so the barcode is whole.
    assert read_numbers(decode_clip(path, Bucket(120, 48, 3), fps=24)) == [0, 1, 2]
    # Covering 80x48 without the ratio would keep all too; with it, the sides are cut.
    assert read_numbers(decode_clip(path, Bucket(80, 48, 3), fps=24)) != [0, 1, 2]


@pytest.mark.parametrize(
    ("size", "pix_fmt"),
    [((161, 97), "yuv444p"), ((160, 96), "yuv420p10le"), ((160, 96), "gray"), ((1000, 20), "yuv420p")],
)
def test_odd_sizes_and_formats_are_converted(tmp_path: Path, size: tuple[int, int], pix_fmt: str) -> None:
    path = write_clip(tmp_path / "odd.mp4", 5, size=size, pix_fmt=pix_fmt)
    frames = decode_clip(path, Bucket(size[0] // 2, size[1] // 2, 5), fps=24)
    assert read_numbers(frames) == [0, 1, 2, 3, 4]
    if pix_fmt != "gray":  # the test's own conversion to gray leaves the range untagged
        # Lossy coding and the resize blur the columns' edges; their levels stay.
        assert abs(float(frames[3].mean()) - float(draw_frame(3, *size).mean())) < 6


@pytest.mark.parametrize("full_range", [False, True])
def test_colours_of_a_resize_are_those_of_the_formulas(tmp_path: Path, full_range: bool) -> None:
    """Against planes resized in fp32 by torch and BT.601's matrix; one step of swscale to RGB is 5 off."""
    axes = np.meshgrid(np.linspace(0, 9, 96), np.linspace(0, 6, 160), indexing="ij")
    waves = [np.sin(k * axes[0] + m * axes[1] ** 1.2) for k, m in ((1.0, 1.7), (2.3, 0.9), (0.4, 3.1))]
    picture = (128 + 90 * np.stack(waves, -1)).astype(np.uint8)
    path, source_range = tmp_path / "clip.mkv", 2 if full_range else 1
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        stream.codec_context.color_range, stream.codec_context.colorspace = source_range, 5
        frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p", dst_color_range=source_range)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert (frame.color_range, frame.colorspace) == (source_range, 5)
        planes = [np.array(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width] for p in frame.planes]
    scaled = [
        interpolate(torch.from_numpy(p)[None, None].float(), (48, 80), mode="bicubic", antialias=True)[0, 0].numpy()
        for p in planes
    ]
    luma, blue, red = (
        (scaled[0], scaled[1] - 128, scaled[2] - 128)
        if full_range
        else ((scaled[0] - 16) * 255 / 219, (scaled[1] - 128) * 255 / 224, (scaled[2] - 128) * 255 / 224)
    )
    green = luma - 0.114 * 1.772 / 0.587 * blue - 0.299 * 1.402 / 0.587 * red
    wanted = np.stack([luma + 1.402 * red, green, luma + 1.772 * blue], -1).clip(0, 255)
    found = decode_clip(path, Bucket(80, 48, 1), fps=24)[0]
    assert np.abs(found - wanted).mean() < 1.0


@pytest.mark.parametrize(("tag", "red_share", "blue_share"), [(None, 0.299, 0.114), (1, 0.2126, 0.0722)])
def test_the_matrix_is_that_of_the_tag_and_without_one_bt601_even_of_hd(
    tmp_path: Path, tag: int | None, red_share: float, blue_share: float
) -> None:
    """As docs/data.md says; one plain colour, decoded by the formulas of BT.601 and BT.709."""
    path, (luma, blue, red) = tmp_path / "hd.mkv", (120, 100, 170)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        if tag is not None:
            stream.codec_context.colorspace = tag
        planes = [np.full((720, 1280), luma), np.full((180, 1280), blue), np.full((180, 1280), red)]
        frame = av.VideoFrame.from_ndarray(np.concatenate(planes).astype(np.uint8), "yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    y, b, r = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    rgb = [y + 2 * (1 - red_share) * r, 0.0, y + 2 * (1 - blue_share) * b]
    rgb[1] = (y - red_share * rgb[0] - blue_share * rgb[2]) / (1 - red_share - blue_share)
    found = decode_clip(path, Bucket(64, 36, 1), fps=24)[0].reshape(-1, 3).mean(axis=0)
    # Rounding moves a colour by a level or two, the other matrix by over ten.
    np.testing.assert_allclose(found, np.array(rgb) * 255, atol=2)


def test_crop_places() -> None:
    bucket = Bucket(40, 40, 1)
    assert crop_window(160, 80, bucket, (0.5, 0.5)).x == 20
    assert crop_window(160, 80, bucket, (0.0, 0.0)).x == 0
    assert crop_window(160, 80, bucket, (0.999999, 0.0)).x == 40
    assert crop_window(80, 160, bucket, (0.5, 0.999999)).y == 40


def test_the_part_that_is_asked_for_is_cropped(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 1, size=(160, 80), first=1)
    left, right = (decode_clip(path, Bucket(80, 80, 1), fps=24, crop_xy=(x, 0.5))[0].astype(int) for x in (0.0, 0.999))
    wanted = draw_frame(1, 160, 80).astype(int)
    # Column levels are 20 and 220; compression moves them by a few.
    assert np.abs(left - wanted[:, :80]).mean() < 8
    assert np.abs(right - wanted[:, 80:]).mean() < 8


def test_images_are_one_frame_clips_with_transparency_over_black(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.new("RGBA", (40, 20), (200, 100, 50, 128)).save(path)
    frames = decode_clip(path, Bucket(20, 10, 1), fps=16)
    np.testing.assert_allclose(frames[0, 5, 10], [100, 50, 25], atol=2)
    Image.new("RGB", (40, 20), (200, 100, 50)).save(tmp_path / "a.jpg")
    # JPEG's chroma rounding.
    np.testing.assert_allclose(
        decode_clip(tmp_path / "a.jpg", Bucket(20, 10, 1), fps=16)[0, 5, 10], [200, 100, 50], atol=4
    )


def test_too_few_or_damaged_frames_are_errors(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", 10, container_options={"movflags": "faststart"})
    with pytest.raises(DataError, match=r"sample x: .*10 frames at 24 fps, 11 wanted"):
        decode_clip(path, Bucket(80, 48, 11), fps=24, name="sample x")
    with pytest.raises(DataError, match="truncated"):
        decode_clip(path.read_bytes()[:-200], Bucket(80, 48, 5), fps=24)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_clip(b"", Bucket(80, 48, 5), fps=24)


def test_duplicates_fill_a_slow_clip_when_allowed(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "slow.mp4", 5, fps=8)
    frames = decode_clip(path, Bucket(80, 48, 9), fps=16, allow_duplicate_frames=True)
    assert read_numbers(frames) == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_frames_cut_by_an_edit_list_are_not_shown(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", 60)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        video = source.streams.video[0]
        copy = cut.add_stream_from_template(video)
        assert video.time_base is not None
        frame_pts = int(Fraction(1, 24) / video.time_base)
        for packet in source.demux(video):
            # Keyframes are 0, 12, 24...: what shows from frame 17 must be decoded from frame 12.
            if packet.dts is not None and packet.pts is not None and packet.pts >= 11 * frame_pts:
                packet.stream = copy
                packet.pts -= 17 * frame_pts
                packet.dts -= 17 * frame_pts
                cut.mux(packet)
    assert read_numbers(decode_clip(tmp_path / "cut.mp4", Bucket(80, 48, 5), fps=24)) == [17, 18, 19, 20, 21]
    late = decode_clip(tmp_path / "cut.mp4", Bucket(80, 48, 5), fps=24, choice=0.999)
    assert read_numbers(late) == [55, 56, 57, 58, 59]


def test_a_decoder_that_skips_a_frame_is_noticed(tmp_path: Path) -> None:
    # Frame 6's payload is overwritten: the packet is there, the picture is not.
    path = write_clip(tmp_path / "a.mp4", 10, options={"g": "100", "bf": "0", "preset": "ultrafast"})
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = next(
            p for p in container.demux(video=0) if p.pts is not None and p.size and p.pts * p.time_base * 24 == 6
        )
        assert packet.pos is not None
        content[packet.pos : packet.pos + packet.size] = b"\0" * packet.size
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_clip(bytes(content), Bucket(80, 48, 10), fps=24)
