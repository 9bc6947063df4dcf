"""From shards to batches with a real tiny pipeline: same samples for any number of ranks, damage, caches, resume."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import pack_clips
from wan_dist.core.errors import DataError
from wan_dist.core.order import Block, SampleOrder
from wan_dist.data.batching import Batch, ClipBatches
from wan_dist.data.clips import ClipDataset
from wan_dist.data.encode import Encoders, load_encoders
from wan_dist.data.index import open_shards
from wan_dist.data.shapes import draw_clips
from wan_dist.models.wan.build import make_tiny_pipeline

NUM_CLIPS = 6
BLOCK = 4
NUM_BLOCKS = 5  # 20 samples of 10 clips: clips come again, and blocks span two epochs
Sample = tuple[int, str, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Two sizes, hence two buckets.
    clips = [*draw_clips(5, 32, 32)[:NUM_CLIPS], *draw_clips(5, 32, 64, shapes=["triangle"])[:4]]
    return pack_clips(tmp_path_factory.mktemp("batching"), clips, fps=8.0)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    model = make_tiny_pipeline("ti2v-5B", tmp_path_factory.mktemp("model") / "tiny")
    return load_encoders(model, torch.device("cpu"), torch.float32)


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> tuple[Path, str]:
    """The shards with one byte of one clip changed, and that clip's key."""
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    opened = open_shards(folder)
    row = next(row for row in opened.index(0) if row["width"] == row["height"])
    with opened.tar_path(0).open("r+b") as stream:
        stream.seek(int(row["media_offset"]) + int(row["media_size"]) // 2)
        stream.write(bytes([stream.read(1)[0] ^ 0xFF]))
    return folder, row["key"].decode()


def open_batches(shards: Path, encoders: Encoders, **changes: Any) -> ClipBatches:
    dataset = ClipDataset.open(
        shards,
        sizes=[(32, 32), (64, 32)],
        num_frames=[5],
        fps=8.0,
        frame_choice="head",
        crop="center",
        allow_duplicate_frames=False,
        allow_upscale=False,
    )
    values: dict[str, Any] = {
        "with_condition": False,
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 1,
        "seed": 5,
        "caption_dropout": 0.0,
        "num_workers": 0,
        "cache_bytes": 1 << 30,
        "max_bad_fraction": 1.0,
    }
    return ClipBatches(dataset, encoders, SampleOrder(dataset.counts, BLOCK, 64, seed=5), **{**values, **changes})


def read(batches: ClipBatches, num_blocks: int, epoch: int = 0, block: int = 0) -> list[tuple[Block, list[Batch]]]:
    try:
        return [(b, list(micro)) for b, micro in islice(batches.steps(epoch, block), num_blocks)]
    finally:
        batches.close()


def samples(micro_batches: Sequence[Batch]) -> Iterator[Sample]:
    for batch in micro_batches:
        yield from zip(batch.positions, batch.keys, batch.latents, batch.text_embeds, strict=True)


def assert_same(left: Sequence[Sample], right: Sequence[Sample]) -> None:
    assert [s[:2] for s in left] == [s[:2] for s in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a[2], b[2])
        assert torch.equal(a[3], b[3])


@pytest.fixture(scope="module")
def reference(shards: Path, encoders: Encoders) -> list[tuple[Block, list[Sample]]]:
    """What one rank sees with a micro-batch of one."""
    return [(block, list(samples(micro))) for block, micro in read(open_batches(shards, encoders), NUM_BLOCKS)]


@pytest.mark.parametrize(
    ("world_size", "micro", "num_workers"), [(1, 2, 0), (1, 4, 2), (2, 1, 0), (2, 2, 2), (4, 1, 1)]
)
def test_ranks_and_micro_batches_share_the_same_samples(
    shards: Path,
    encoders: Encoders,
    reference: list[tuple[Block, list[Sample]]],
    world_size: int,
    micro: int,
    num_workers: int,
) -> None:
    per_rank = [
        read(
            open_batches(
                *(shards, encoders),
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro,
                num_workers=num_workers,
                caption_dropout=0.0,
            ),
            NUM_BLOCKS,
        )
        for rank in range(world_size)
    ]
    for number, (block, wanted) in enumerate(reference):
        steps = [blocks[number] for blocks in per_rank]
        assert {found for found, _ in steps} == {block}
        # Micro-steps come in order of position, as many on every rank, each of one bucket.
        assert {len(batches) for _, batches in steps} == {BLOCK // (world_size * micro)}
        assert all(batch.bucket == block.bucket for _, batches in steps for batch in batches)
        assert_same([sample for _, batches in steps for sample in samples(batches)], wanted)


def test_every_clip_of_a_bucket_comes_once_before_it_comes_again(
    reference: list[tuple[Block, list[Sample]]],
) -> None:
    for bucket, count in ((0, NUM_CLIPS), (1, 4)):
        seen = sorted(s[:2] for block, found in reference if block.bucket == bucket for s in found)
        first = [key for position, key in seen if position < count]
        assert len(set(first)) == len(first)
    assert {block.bucket for block, _ in reference} == {0, 1}


def test_latents_are_the_normalised_posterior_mean(
    shards: Path, encoders: Encoders, reference: list[tuple[Block, list[Sample]]]
) -> None:
    block, found = reference[0]
    batch = read(open_batches(shards, encoders, micro_batch_size=BLOCK), 1)[0][1][0]
    assert batch.latents.dtype == torch.float32
    assert batch.latents.shape == (BLOCK, 48, 2, 2, 2 if block.bucket == 0 else 4)
    assert batch.text_embeds.shape[:2] == (BLOCK, 512)
    assert torch.equal(batch.latents[1], found[1][2])


def test_the_text_is_the_clips_own_caption(encoders: Encoders, reference: list[tuple[Block, list[Sample]]]) -> None:
    captions = {c.name: c.caption for c in draw_clips(5, 32, 32, shapes=["circle", "square", "triangle"])}
    for _, key, _, text in (sample for _, found in reference for sample in found):
        assert torch.equal(text, encoders.encode_prompts([captions[key]])[0])


@pytest.mark.parametrize("start", range(1, NUM_BLOCKS))
def test_a_saved_place_continues_with_the_same_batches(
    shards: Path, encoders: Encoders, reference: list[tuple[Block, list[Sample]]], start: int
) -> None:
    before, _ = reference[start - 1]
    rest = read(open_batches(shards, encoders), NUM_BLOCKS - start, before.epoch, before.block + 1)
    for (block, micro), (wanted_block, wanted) in zip(rest, reference[start:], strict=True):
        assert block == wanted_block
        assert_same(list(samples(micro)), wanted)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_latents", [0, 1, 3])
def test_a_cache_of_any_size_gives_the_same_batches(
    shards: Path,
    encoders: Encoders,
    reference: list[tuple[Block, list[Sample]]],
    num_latents: int,
    num_workers: int,
) -> None:
    one = 48 * 2 * 2 * 2 * 4
    batches = open_batches(shards, encoders, cache_bytes=num_latents * one, num_workers=num_workers)
    for (_, micro), (_, wanted) in zip(read(batches, NUM_BLOCKS), reference, strict=True):
        assert_same(list(samples(micro)), wanted)


def test_dropout_empties_the_configured_share_of_prompts_whoever_asks(shards: Path, encoders: Encoders) -> None:
    empty = encoders.encode_prompts([""])[0]

    def dropped(**changes: Any) -> set[tuple[int, int]]:
        blocks = read(open_batches(shards, encoders, caption_dropout=0.3, **changes), 75)
        return {
            (block.bucket, position)
            for block, micro in blocks
            for position, _, _, text in samples(micro)
            if torch.equal(text, empty)
        }

    alone = dropped()
    # 300 draws: the standard deviation of the share is 0.026.
    assert len(alone) / 300 == pytest.approx(0.3, abs=0.08)
    assert alone == dropped(rank=0, world_size=2) | dropped(rank=1, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_clip_is_replaced_by_the_same_one_each_time_and_counted(
    damaged: tuple[Path, str],
    encoders: Encoders,
    reference: list[tuple[Block, list[Sample]]],
    num_workers: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, key = damaged
    caplog.set_level(logging.WARNING)

    def run(**changes: Any) -> tuple[list[list[Sample]], ClipBatches]:
        batches = open_batches(folder, encoders, num_workers=num_workers, **changes)
        return [list(samples(micro)) for _, micro in read(batches, NUM_BLOCKS)], batches

    first, batches = run()
    wanted = [found for _, found in reference]
    num_damaged = sum(key == s[1] for found in wanted for s in found)
    assert num_damaged > 0
    for found, whole in zip(first, wanted, strict=True):
        for ours, theirs in zip(found, whole, strict=True):
            assert ours[0] == theirs[0]
            assert (ours[1] == theirs[1]) == (theirs[1] != key)
    assert len(batches.bad_samples) >= num_damaged
    assert all(f"sample {key}: damaged (checksum differs)" in problem for problem in batches.bad_samples)
    assert batches.num_read == NUM_BLOCKS * BLOCK + len(batches.bad_samples)
    assert f"replaced an unreadable sample: {folder}" in caplog.text
    again, _ = run()
    halves = [run(rank=rank, world_size=2)[0] for rank in (0, 1)]
    for number, found in enumerate(first):
        assert_same(again[number], found)
        assert_same([*halves[0][number], *halves[1][number]], found)


def test_too_many_damaged_clips_end_training(damaged: tuple[Path, str], encoders: Encoders) -> None:
    folder, key = damaged
    with pytest.raises(DataError, match=r"samples could not be read \(data\.max_bad_fraction = 0\.01\)") as caught:
        read(open_batches(folder, encoders, max_bad_fraction=0.01), 20)
    assert f"sample {key}" in str(caught.value)


def test_a_bucket_without_a_readable_clip_is_said_at_once(shards: Path, encoders: Encoders, tmp_path: Path) -> None:
    folder = tmp_path / "all-damaged"
    shutil.copytree(shards, folder)
    tar = open_shards(folder).tar_path(0)
    before = tar.stat()
    tar.write_bytes(bytes(before.st_size))
    # A disk that fails does not change the time; a newer shard would be refused as a replaced one.
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="8 samples in a row could not be read; check the shards"):
        read(open_batches(folder, encoders), 1)


def test_a_block_that_ranks_do_not_divide_is_our_own_mistake(shards: Path, encoders: Encoders) -> None:
    with pytest.raises(ValueError, match="block of 4 does not divide by 3 x 1"):
        open_batches(shards, encoders, world_size=3)


def test_padding_weighs_nothing_and_the_rest_fills_in(shards: Path, encoders: Encoders) -> None:
    batches = open_batches(shards, encoders)
    batches._order = batches._dataset.order(BLOCK, 64, 5, "pad")
    # 6 and 4 clips in blocks of 4: one block has two clips and two of padding.
    steps = read(batches, 3)
    weights = [[1.0 if b.loss_weights is None else float(b.loss_weights) for b in micro] for _, micro in steps]
    assert sorted(weights) == sorted([[1.0] * 4, [1.0] * 4, [2.0, 2.0, 0.0, 0.0]])
    real = [b.keys[0] for _, micro in steps for b in micro if b.loss_weights is None or float(b.loss_weights)]
    assert len(set(real)) == len(real) == 10
