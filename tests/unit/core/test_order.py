"""The sample order: exactly once, the same for any number of ranks, resumable anywhere."""

import itertools

import numpy as np
import pytest

from wan_dist.core.errors import DataError
from wan_dist.core.order import Block, SampleOrder, SampleRef


def samples(order: SampleOrder, block: Block) -> list[SampleRef]:
    return [order.at(block.bucket, block.first + i) for i in range(order.block_size)]


@pytest.mark.parametrize("trial", range(6))
def test_every_sample_comes_once_per_epoch_of_its_bucket(trial: int) -> None:
    rng = np.random.default_rng(trial)
    counts = rng.integers(0, 12, (int(rng.integers(1, 12)), int(rng.integers(1, 5))))
    counts[0, 0] += 1
    order = SampleOrder(
        counts, block_size=int(rng.choice([1, 4, 16])), window_shards=int(rng.integers(1, 5)), seed=trial
    )
    for bucket, total in enumerate(counts.sum(0)):
        if not total:
            continue
        for epoch in range(3):
            refs = [order.at(bucket, epoch * int(total) + i) for i in range(int(total))]
            assert len(set(refs)) == total
            assert all(ref.epoch == epoch and 0 <= ref.index < counts[ref.shard, bucket] for ref in refs)


def test_blocks_cover_each_bucket_stream_without_gap() -> None:
    counts = np.array([[5, 0, 3], [2, 0, 9], [7, 0, 1]])
    order = SampleOrder(counts, block_size=4, window_shards=2, seed=3)
    taken = list(itertools.islice(order.blocks(), 60))
    for bucket in (0, 2):
        firsts = [b.first for b in taken if b.bucket == bucket]
        assert firsts == [4 * i for i in range(len(firsts))]
    assert not any(b.bucket == 1 for b in taken)
    for epoch in range(taken[-1].epoch):
        assert sum(b.epoch == epoch for b in taken) == order.blocks_per_epoch(epoch)


def test_resume_from_any_block_matches_straight_run() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (7, 3))
    order = SampleOrder(counts, block_size=8, window_shards=3, seed=5)
    straight = list(itertools.islice(order.blocks(), 50))
    for cut in range(len(straight) - 3):
        fresh = SampleOrder(counts, block_size=8, window_shards=3, seed=5)
        resumed = list(itertools.islice(fresh.blocks(straight[cut].epoch, straight[cut].block), 3))
        assert resumed == straight[cut : cut + 3]
        assert samples(fresh, resumed[0]) == samples(order, straight[cut])
    # A state saved after an epoch's last block goes on with the next epoch.
    last = max(b.block for b in straight if b.epoch == 0)
    follower = next(order.blocks(0, last + 1))
    assert follower == straight[last + 1]


def test_ranks_share_a_block_whatever_their_number() -> None:
    order = SampleOrder(np.full((6, 2), 10), block_size=8, window_shards=2, seed=1)
    block = next(order.blocks())
    whole = samples(order, block)
    for ranks in (1, 2, 4, 8):
        share = order.block_size // ranks
        split = [order.at(block.bucket, block.first + r * share + i) for r in range(ranks) for i in range(share)]
        assert split == whole


def test_a_bucket_smaller_than_a_block_spans_epochs() -> None:
    order = SampleOrder(np.array([[3]]), block_size=8, window_shards=4, seed=0)
    assert [order.blocks_per_epoch(e) for e in range(4)] == [0, 0, 1, 0]
    blocks = list(itertools.islice(order.blocks(), 3))
    assert [b.first for b in blocks] == [0, 8, 16]
    assert [b.epoch for b in blocks] == [2, 5, 7]
    assert sorted(ref.index for ref in samples(order, blocks[0])[:3]) == [0, 1, 2]
    # One sample in a huge block: millions of epochs without a block are skipped, not walked.
    far = next(SampleOrder(np.array([[1]]), block_size=10**9, window_shards=1, seed=0).blocks())
    assert far == Block(epoch=10**9 - 1, block=0, bucket=0, first=0)


def test_seed_and_epoch_change_the_order() -> None:
    counts = np.full((4, 1), 25)
    a, b = (SampleOrder(counts, 10, 2, seed) for seed in (0, 1))
    first = [a.at(0, i) for i in range(100)]
    assert [(r.shard, r.index) for r in first] != [(r.shard, r.index) for r in (a.at(0, 100 + i) for i in range(100))]
    assert first != [b.at(0, i) for i in range(100)]


def test_shards_of_a_window_are_read_together() -> None:
    order = SampleOrder(np.full((8, 1), 10), block_size=10, window_shards=2, seed=0)
    for window in range(4):
        assert len({order.at(0, 20 * window + i).shard for i in range(20)}) == 2


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="0 samples"):
        SampleOrder(np.zeros((3, 2), int), 4, 2, 0)


def test_a_state_of_other_data_is_refused() -> None:
    order = SampleOrder(np.array([[8]]), 4, 1, 0)
    with pytest.raises(DataError, match="block 3"):
        next(order.blocks(0, 3))


def test_order_is_the_same_on_every_machine_and_version() -> None:
    order = SampleOrder(np.array([[3, 1], [2, 4], [0, 5]]), 2, 2, 7)
    assert [(r.shard, r.index) for r in (order.at(0, i) for i in range(5))] == [(0, 1), (0, 0), (0, 2), (1, 1), (1, 0)]
    assert [b.bucket for b in itertools.islice(order.blocks(), 7)] == [1, 1, 1, 1, 0, 1, 0]
