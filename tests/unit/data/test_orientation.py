"""Turned and mirrored pictures are shown as other programs show them, all eight ways, in every kind of file."""

import struct
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from wan_dist.core.buckets import Bucket
from wan_dist.data.clips import ClipDataset
from wan_dist.data.decode import decode_clip
from wan_dist.data.index import open_shards
from wan_dist.data.media import MediaError
from wan_dist.data.orientation import Orientation, orientation_of
from wan_dist.data.pack import pack_clips
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.probe import ClipInfo, Reject, probe_clip

MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""Display matrices (a, b, c, d) of the EXIF orientations: (x, y) is shown at (a x + c y, b x + d y)."""

SIZE = 80, 48
EXIF_ORIENTATION = 0x112


def quarters() -> Image.Image:
    """Four colours, so that every orientation looks different."""
    picture = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    picture[:24, :40], picture[:24, 40:], picture[24:, :40] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
    picture[24:, 40:] = (200, 200, 200)
    return Image.fromarray(picture)


def shown(orientation: int) -> NDArray[np.int16]:
    """The four colours of the picture as Pillow shows it, [2, 2, 3]."""
    picture = quarters()
    picture.getexif()[EXIF_ORIENTATION] = orientation
    return corners(np.asarray(ImageOps.exif_transpose(picture)))


def corners(frame: NDArray[np.uint8]) -> NDArray[np.int16]:
    height, width, _ = frame.shape
    rows, columns = np.ix_([height // 4, height * 3 // 4], [width // 4, width * 3 // 4])
    return frame[rows, columns].astype(np.int16)


def write_video(path: Path, orientation: int) -> Path:
    """Write two frames whose `tkhd` box has the matrix of an orientation."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"  # type: ignore[attr-defined]
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_image(quarters())))  # type: ignore[attr-defined]
        container.mux(stream.encode())  # type: ignore[attr-defined]
    a, b, c, d = (value << 16 for value in MATRICES[orientation])
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def assert_shown(frame: NDArray[np.uint8], orientation: int) -> None:
    # JPEG and H.264 move plain colours by a few levels; the quarters differ by over 100.
    assert np.abs(corners(frame) - shown(orientation)).max() < 20, orientation


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", MATRICES)
def test_images_are_shown_as_pillow_shows_them(tmp_path: Path, extension: str, orientation: int) -> None:
    path, exif = tmp_path / f"a.{extension}", Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    quarters().save(path, exif=exif, quality=95)
    width, height = ImageOps.exif_transpose(Image.open(path)).size
    info = probe_clip(path, "a")
    assert isinstance(info, ClipInfo)
    assert (info.width, info.height) == (width, height)
    assert_shown(decode_clip(path, Bucket(width, height, 1), fps=24)[0], orientation)


def test_videos_are_shown_as_pillow_shows_images_and_transcoding_keeps_that(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for orientation in MATRICES:
        write_video(clips / f"{orientation}.mp4", orientation)
        (clips / f"{orientation}.txt").write_text("quarters")
    for rules in (ClipRules(), ClipRules(transcode="480p")):
        out = tmp_path / f"shards-{rules.transcode}"
        pack_clips(clips, out, rules=rules)
        opened = open_shards(out)
        for row in opened.index(0):
            orientation = int(row["key"])
            width, height = SIZE if orientation < 5 else SIZE[::-1]
            assert (row["width"], row["height"]) == (width, height), orientation
            content = opened.tar(0).read_range(int(row["media_offset"]), int(row["media_size"]))
            assert (content == (clips / f"{orientation}.mp4").read_bytes()) == (not rules.transcode)
            assert_shown(decode_clip(content, Bucket(width, height, 2), fps=24)[1], orientation)


@pytest.mark.parametrize("transcode", [None, "480p"])
def test_masks_are_mirrored_as_their_clips_are(tmp_path: Path, transcode: Literal["480p"] | None) -> None:
    """A mask that is mirrored itself and one that is drawn as the clip is shown cover the same corner."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("stored", "drawn"):
        write_video(clips / f"{name}.mp4", 7)
        (clips / f"{name}.txt").write_text("quarters")
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 0, SIZE[0] // 2, SIZE[1] // 2))
    mask.getexif()[EXIF_ORIENTATION] = 7
    mask.save(clips / "stored.mask.png", exif=mask.getexif())
    ImageOps.exif_transpose(mask).save(clips / "drawn.mask.png")
    pack_clips(clips, tmp_path / "shards", rules=ClipRules(transcode=transcode))
    dataset = ClipDataset.open(tmp_path / "shards", sizes=[(SIZE[1], SIZE[0])], num_frames=[1], fps=24.0)
    for key in ("stored", "drawn"):
        clip = dataset.locate(*dataset.find(key), choice=0.0, crop_xy=(0.5, 0.5))
        found = dataset.mask(clip)
        assert found is not None
        assert corners(found[0])[..., 0].tolist() == [[0, 0], [0, 255]]
        # The red quarter, which the mask covers.
        assert_shown(dataset.frames(clip)[0], 7)
        assert corners(dataset.frames(clip)[0])[1, 1].argmax() == 0


def test_a_frame_without_a_matrix_is_upright_and_a_slanted_one_is_rejected(tmp_path: Path) -> None:
    assert orientation_of(av.VideoFrame.from_image(quarters())) == Orientation()
    path = write_video(tmp_path / "a.mp4", 1)
    content = path.read_bytes()
    start = content.index(b"tkhd") + 44
    slanted = struct.pack(">9i", 46341, 46341, 0, 46341, -46341, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:start] + slanted + content[start + 36 :])
    found = probe_clip(path, "a.mp4")
    assert isinstance(found, Reject)
    assert found.code == "odd_rotation"
    with av.open(str(path)) as container, pytest.raises(MediaError, match="quarter turns and mirrors"):
        orientation_of(next(container.decode(video=0)))
