"""The training view: buckets, counts, drops and decoded samples."""

from pathlib import Path

import numpy as np
import pytest

from tests.clips import REAL_CLIPS, read_numbers, write_clip
from wan_dist.core.errors import DataError
from wan_dist.data.clips import ClipDataset
from wan_dist.data.pack import pack_clips

CENTER = (0.5, 0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    clips = folder / "clips"
    clips.mkdir()
    write_clip(clips / "a-long.mp4", 40, fps=16)
    write_clip(clips / "b-short.mp4", 7, fps=16)
    write_clip(clips / "c-portrait.mp4", 20, fps=16, size=(96, 160))
    write_clip(clips / "d-slow.mp4", 20, fps=8)
    write_clip(clips / "e-small.mp4", 20, fps=16, size=(60, 36))
    write_clip(clips / "f-tiny.mp4", 3, fps=16)
    for path in clips.glob("*.mp4"):
        path.with_suffix(".json").write_text(f'{{"caption": ["{path.stem}", "again {path.stem}"]}}')
    pack_clips(clips, folder / "shards", shard_clips=3)
    return folder / "shards"


def opened(shards: Path, **changes: object) -> ClipDataset:
    rules = {"sizes": [(80, 48), (48, 80)], "num_frames": [5, 17], "fps": 16.0, **changes}
    return ClipDataset.open(shards, **rules)  # type: ignore[arg-type]


def test_clips_go_to_buckets_and_drops_are_counted(shards: Path) -> None:
    dataset = opened(shards)
    assert [(b.width, b.height, b.num_frames) for b in dataset.buckets] == [
        (80, 48, 5),
        (80, 48, 17),
        (48, 80, 5),
        (48, 80, 17),
    ]
    np.testing.assert_array_equal(dataset.counts, [[1, 1, 0, 1], [0, 0, 0, 0]])
    assert dataset.drops == {"low_fps": 1, "too_small": 1, "too_short": 1}
    table = dataset.table()
    assert "3 of 6 clips used" in table
    assert "80x48, 17 frames: 1 clip" in table
    assert "left out, low_fps: 1" in table


def test_permissions_admit_more_clips(shards: Path) -> None:
    dataset = opened(shards, allow_duplicate_frames=True, allow_upscale=True, num_frames=[1, 5])
    assert dataset.counts.sum() == 6
    assert dataset.drops == {}


def test_load_returns_the_right_frames_and_captions(shards: Path) -> None:
    sample = opened(shards).load(1, 0, 0, choice=0.9, crop_xy=CENTER)
    assert sample.key == "a-long"
    assert sample.captions == ("a-long", "again a-long")
    assert sample.frames.shape == (17, 48, 80, 3)
    assert sample.frames.dtype == np.uint8
    assert read_numbers(sample.frames) == list(range(17))
    centred = opened(shards, frame_choice="center").load(1, 0, 0, choice=0.9, crop_xy=CENTER)
    assert read_numbers(centred.frames) == [int(np.ceil(11.5 - 0.5)) + k for k in range(17)]
    late = opened(shards, frame_choice="random").load(1, 0, 0, choice=0.999, crop_xy=CENTER)
    assert read_numbers(late.frames) == list(range(23, 40))


def test_cache_key_follows_the_pixels(shards: Path) -> None:
    def key(dataset: ClipDataset, choice: float, crop_xy: tuple[float, float]) -> str:
        located = dataset.locate(1, 0, 0, choice=choice, crop_xy=crop_xy)
        assert located.cache_key == dataset.load(1, 0, 0, choice=choice, crop_xy=crop_xy).cache_key
        return located.cache_key

    fixed = opened(shards, sizes=[(40, 48)])
    assert key(fixed, 0.1, (0.0, 0.0)) == key(fixed, 0.9, (0.9, 0.9))
    moving = opened(shards, frame_choice="random", crop="random", sizes=[(40, 48)])
    keys = {key(moving, c, (x, 0.5)) for c in (0.1, 0.9) for x in (0.0, 0.5, 0.9)}
    assert len(keys) == 6
    # Crops that fall on the same pixel are the same crop.
    assert key(moving, 0.1, (0.0, 0.5)) == key(moving, 0.1, (0.001, 0.5))
    assert key(opened(shards, sizes=[(40, 48)], fps=12.0), 0.0, CENTER) != key(fixed, 0.0, CENTER)


def test_digest_follows_the_rules(shards: Path) -> None:
    assert opened(shards).digest == opened(shards).digest
    changes = [{"fps": 15.0}, {"sizes": [(80, 48)]}, {"crop": "random"}, {"allow_upscale": True}]
    assert len({opened(shards, **change).digest for change in [{}, *changes]}) == 5


def test_no_usable_clip_is_one_line_that_says_what_to_change(shards: Path) -> None:
    with pytest.raises(DataError, match=r"none of 6 clips .* 6 low_fps: .*lower data\.fps.* 8 to 16 fps") as caught:
        opened(shards, fps=60.0)
    assert "\n" not in str(caught.value)


def test_damage_names_shard_and_sample(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tar = tmp_path / "data-000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.find(b"ftyp") + 100] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DataError, match=r"data-000000\.tar: sample a-long: damaged"):
        opened(tmp_path).load(1, 0, 0, choice=0.0, crop_xy=CENTER)


@pytest.mark.skipif(not REAL_CLIPS.is_dir(), reason=f"the real clips are not at {REAL_CLIPS}")
def test_real_clips_pack_and_decode_without_repeated_frames(tmp_path: Path) -> None:
    result = pack_clips(REAL_CLIPS, tmp_path, captions_path=REAL_CLIPS / "captions.jsonl")
    assert (result.num_clips, result.rejects) == (4, {})
    dataset = opened(tmp_path, sizes=[(96, 64)], num_frames=[33], fps=8.0)
    assert dataset.counts.tolist() == [[4]]
    for index in range(4):
        sample = dataset.load(0, 0, index, choice=0.0, crop_xy=CENTER)
        assert len(sample.captions[0]) > 50
        assert sample.frames.shape == (33, 64, 96, 3)
        assert len({frame.tobytes() for frame in sample.frames}) == 33
    # The 8 fps clip cannot fill 16 fps.
    fast = opened(tmp_path, sizes=[(96, 64)], num_frames=[33], fps=16.0)
    assert (fast.counts.tolist(), fast.drops) == ([[3]], {"low_fps": 1})
