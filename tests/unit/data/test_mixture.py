"""Mixtures, merged buckets, frame choices and held-out clips."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.clips import read_numbers, write_clip
from wan_dist.core.errors import DataError
from wan_dist.data.clips import ClipDataset
from wan_dist.data.index import open_shards
from wan_dist.data.mixture import MixedShards, ShardSource, check_held_out, mixing_rates
from wan_dist.data.pack import pack_clips

CENTER = (0.5, 0.5)


def pack(folder: Path, name: str, clips: dict[str, int], *, first: int = 0, image: bool = False) -> Path:
    source = folder / f"{name}-clips"
    source.mkdir()
    for number, (key, frames) in enumerate(clips.items()):
        write_clip(source / f"{key}.mp4", frames, fps=16, first=first + number)
        (source / f"{key}.txt").write_text(f"{name} {key}")
    if image:
        Image.fromarray(np.full((96, 160, 3), 90, np.uint8)).save(source / "still.png")
        (source / "still.txt").write_text("a picture")
    pack_clips(source, folder / name, shard_clips=2)
    return folder / name


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    a = pack(folder, "a", {"a1": 20, "a2": 20, "a3": 20, "a4": 7}, image=True)
    return a, pack(folder, "b", {"b1": 20, "b2": 20}, first=50)


def opened(*sources: ShardSource | Path, **rules: object) -> ClipDataset:
    named = [s if isinstance(s, ShardSource) else ShardSource(s) for s in sources]
    return ClipDataset.open(named, **{"sizes": [(80, 48)], "num_frames": [1, 5, 17], "fps": 16.0, **rules})  # type: ignore[arg-type]


def test_data_sets_come_as_often_as_they_should(two: tuple[Path, Path]) -> None:
    dataset = opened(ShardSource(two[0]), ShardSource(two[1], repeats=3.0, loss_weight=0.5))
    np.testing.assert_array_equal(dataset.counts.sum(0), [1, 1, 5])
    order = dataset.order(3, 64, 0)
    assert order.samples_per_epoch() == [1, 1, 3 + 6]
    keys = []
    for position in range(9):
        ref = order.at(2, position)
        sample = dataset.load(2, ref.shard, ref.index, choice=0.0, crop_xy=CENTER)
        keys.append(sample.key)
        assert dataset.loss_weight(ref.shard) == (0.5 if sample.key.startswith("b") else 1.0)
        assert sample.captions == (f"{sample.key[0]} {sample.key}",)
    assert sorted(keys) == ["a1", "a2", "a3", *["b1"] * 3, *["b2"] * 3]
    assert dataset.digest != opened(*two).digest != opened(two[0]).digest


def test_weights_are_shares_of_the_samples(two: tuple[Path, Path]) -> None:
    mixed = [MixedShards(open_shards(two[0]), weight=1.0), MixedShards(open_shards(two[1]), weight=3.0)]
    rates = mixing_rates(mixed, [5, 2])
    assert rates == [Fraction(7, 4) / 5, Fraction(21, 4) / 2]
    with pytest.raises(DataError, match="b: none of its clips can be used"):
        mixing_rates(mixed, [5, 0])


def test_images_are_clips_of_one_frame(two: tuple[Path, Path]) -> None:
    dataset = opened(two[0], num_frames=[1])
    assert dataset.counts.sum() == 5
    ref = next(dataset.find(key) for key in ("still",))
    assert dataset.load(*ref, choice=0.0, crop_xy=CENTER).frames.shape == (1, 48, 80, 3)
    # Without a bucket of one frame, an image is left out and counted.
    assert opened(two[0], num_frames=[5]).drops == {"too_short": 1}


def test_small_buckets_are_merged_and_stay_decodable(two: tuple[Path, Path]) -> None:
    dataset = opened(two[0], num_frames=[1, 5, 17])
    before = dataset.digest
    dataset.merge_small_buckets(2)
    # The 5-frame bucket's only clip joins the image; 17-frame clips fill their own.
    assert dataset.counts.sum(0).tolist() == [2, 0, 3]
    assert dataset.digest != before
    assert dataset.load(*dataset.find("a4"), choice=0.0, crop_xy=CENTER).frames.shape[0] == 1


@pytest.mark.parametrize(
    ("mode", "choice", "numbers"),
    [
        ("chunk", 0.0, [0, 1, 2, 3, 4]),
        ("chunk", 0.5, [10, 11, 12, 13, 14]),
        ("chunk", 0.99, [15, 16, 17, 18, 19]),
        ("uniform", 0.7, [0, 5, 9, 14, 19]),
        ("native", 0.0, [0, 1, 2, 3, 4]),
    ],
)
def test_frame_choices(two: tuple[Path, Path], mode: str, choice: float, numbers: list[int]) -> None:
    fps = 8.0 if mode == "native" else 16.0
    dataset = opened(two[0], num_frames=[5], frame_choice=mode, fps=fps)
    found = dataset.load(*dataset.find("a1"), choice=choice, crop_xy=CENTER).frames
    assert read_numbers(found) == numbers


def test_native_frames_of_a_variable_rate_are_consecutive(tmp_path: Path) -> None:
    stamps = np.concatenate([[0], np.cumsum(np.random.default_rng(5).integers(10, 150, 19))])
    write_clip(tmp_path / "clips.mp4", 20, stamps_ms=stamps.tolist())
    (tmp_path / "clips.txt").write_text("varying")
    pack_clips(tmp_path, tmp_path / "shards")
    dataset = opened(tmp_path / "shards", num_frames=[5], frame_choice="native", fps=24.0)
    place = dataset.find("clips")
    for choice, first in ((0.0, 0), (0.5, 8), (0.99, 15)):
        clip = dataset.locate(*place, choice=choice, crop_xy=CENTER)
        assert read_numbers(dataset.frames(clip)) == list(range(first, first + 5))
        times = (stamps[first : first + 5] - stamps[0]) / 1000
        np.testing.assert_allclose(dataset.frame_times(clip), times, atol=1e-3)


def test_a_held_out_clip_must_not_be_trained_on(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (open_shards(folder) for folder in two)
    check_held_out([a], [b])
    with pytest.raises(DataError, match=r"data\.validation: 2 clips have the same key as clips of .*b, first b1"):
        check_held_out([a, b], [b])
    # Another name, the same file.
    copy = open_shards(pack(tmp_path, "copy", {"renamed": 20}))
    with pytest.raises(DataError, match=r"1 clips have the same content .* first renamed"):
        check_held_out([a], [copy])
