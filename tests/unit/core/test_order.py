"""The sample order: exactly once, the same for any number of ranks, resumable anywhere."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from wan_dist.core.errors import DataError
from wan_dist.core.mixing import Interleave
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


def epoch_blocks(order: SampleOrder, epoch: int) -> list[Block]:
    return list(itertools.takewhile(lambda b: b.epoch == epoch, order.blocks(epoch)))


def test_pad_makes_every_epoch_exact() -> None:
    counts = np.array([[5, 2, 0], [4, 0, 0]])
    order = SampleOrder(counts, 4, 2, 0, tail="pad")
    for epoch in range(3):
        blocks = epoch_blocks(order, epoch)
        assert [sorted(b.num_padding for b in blocks if b.bucket == k) for k in (0, 1)] == [[0, 0, 3], [2]]
        for bucket, total in ((0, 9), (1, 2)):
            real = [
                order.at(bucket, b.first + i)
                for b in blocks
                if b.bucket == bucket
                for i in range(order.block_size - b.num_padding)
            ]
            assert len({(r.shard, r.index) for r in real}) == len(real) == total
            assert {r.epoch for r in real} == {epoch}


def test_drop_leaves_out_another_tail_each_epoch() -> None:
    order = SampleOrder(np.array([[3], [3]]), 4, 2, 0, tail="drop")
    left_out = []
    for epoch in range(8):
        (block,) = epoch_blocks(order, epoch)
        taken = {(r.shard, r.index) for r in samples(order, block)}
        assert len(taken) == 4
        left_out.append(frozenset({(s, i) for s in range(2) for i in range(3)} - taken))
    assert len(set(left_out)) > 1
    with pytest.raises(DataError, match=r"drop leaves nothing: .* 6 samples per epoch, a block 8"):
        SampleOrder(np.array([[3], [3]]), 8, 2, 0, tail="drop")


@pytest.mark.parametrize("tail", ["pad", "drop"])
def test_resume_matches_with_every_tail(tail: str) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (7, 3))
    order = SampleOrder(counts, 8, 3, 5, tail=tail)  # type: ignore[arg-type]
    straight = list(itertools.islice(order.blocks(), 40))
    for cut in range(38):
        assert (
            list(itertools.islice(order.blocks(straight[cut].epoch, straight[cut].block), 2)) == straight[cut : cut + 2]
        )


def mixed(rates: list[Fraction], block_size: int = 8, **options: object) -> SampleOrder:
    counts = np.array([[30, 4], [10, 0], [12, 3], [8, 0], [5, 5]])
    return SampleOrder(counts, block_size, 2, 1, shards_per_dataset=[2, 2, 1], rates=rates, **options)  # type: ignore[arg-type]


def dataset_of(ref: SampleRef) -> int:
    return [0, 0, 1, 1, 2][ref.shard]


def test_data_sets_are_mixed_in_proportion_to_their_rates() -> None:
    rates = [Fraction(1), Fraction(3, 2), Fraction(4)]
    order = mixed(rates)
    assert order.samples_per_epoch() == [40 + 30 + 20, 4 + 4.5 + 20]
    refs = [order.at(0, i) for i in range(900)]
    # Ten epochs of the bucket: each sample of data set d exactly 10 * rate times.
    for (shard, _), times in Counter((r.shard, r.index) for r in refs).items():
        assert times == 10 * rates[[0, 0, 1, 1, 2][shard]]
    # Every block holds each data set's share, give or take two.
    for start in range(0, 900, 9):
        found = Counter(dataset_of(r) for r in refs[start : start + 9])
        assert all(abs(found[d] - share) <= 2 for d, share in enumerate((4, 3, 2)))


def test_mixing_keeps_the_first_data_sets_own_order() -> None:
    order, alone = mixed([Fraction(1), Fraction(1), Fraction(1)]), SampleOrder(np.array([[30, 4], [10, 0]]), 8, 2, 1)
    own = [ref for i in range(200) if dataset_of(ref := order.at(0, i)) == 0]
    assert own == [alone.at(0, i) for i in range(len(own))]


@pytest.mark.parametrize("tail", ["carry", "pad", "drop"])
def test_mixtures_cover_their_streams_and_resume(tail: str) -> None:
    order = mixed([Fraction(1, 3), Fraction(1), Fraction(7, 5)], tail=tail)
    straight = list(itertools.islice(order.blocks(), 60))
    if tail == "carry":
        for bucket in (0, 1):
            firsts = [b.first for b in straight if b.bucket == bucket]
            assert firsts == [8 * i for i in range(len(firsts))]
    for cut in range(0, 57, 7):
        assert (
            list(itertools.islice(order.blocks(straight[cut].epoch, straight[cut].block), 3)) == straight[cut : cut + 3]
        )


def test_every_place_of_a_mixture_is_taken_once() -> None:
    for rates in ([1, 1], [3, 5, 0, 7], [1, 100], [1], [6, 4, 10**9]):
        mix = Interleave(rates)
        found = [mix.at(i) for i in range(300)]
        for stream in range(len(rates)):
            items = [k for s, k in found if s == stream]
            assert items == list(range(len(items)))
            assert abs(len(items) - 300 * rates[stream] / sum(rates)) <= len(rates)
