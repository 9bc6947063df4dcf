"""The order in which training visits samples: bucketed, exactly once per epoch, resumable from two integers.

Every bucket has an endless stream, the concatenation of one permutation per epoch. The stream is cut into blocks of
`block_size` samples, so a block has one shape for every rank. Which bucket a block uses is a permutation of its own.
Nothing depends on the number of ranks or on history, so 1, 2 or 8 ranks visit the same samples, and a run resumes
from `(epoch, block)` without replaying.

Inside an epoch shards are permuted and taken `window_shards` at a time; the samples of a window are permuted by a
Feistel network with cycle walking, so that no array of the data set's length exists. Measured at 1e8 samples in 1e5
shards, on two shared CPU cores: 17 us per sample and 49 MiB, against 800 MB per rank for a stored permutation.

Source: cycle walking, Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.errors import DataError
from wan_dist.core.rng import mix, seed_of

_FEISTEL_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Block:
    """`block_size` consecutive samples of one bucket.

    Attributes:
        epoch: epoch of the schedule, from 0.
        block: number of this block within the epoch, from 0.
        bucket: the bucket that all its samples share.
        first: position of its first sample in the bucket's endless stream.
    """

    epoch: int
    block: int
    bucket: int
    first: int


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample lies.

    Attributes:
        epoch: how often the bucket was gone through before this sample.
        shard: shard number.
        index: number of the sample among those of its bucket within the shard.
    """

    epoch: int
    shard: int
    index: int


class SampleOrder:
    """The endless sample order over a bucketed, sharded data set.

    Samples left over at the end of an epoch (fewer than `block_size` in a bucket) are carried into the next one, so
    nothing is dropped. A bucket with fewer than `block_size` samples yields a block only every few epochs.
    """

    def __init__(self, counts: NDArray[np.integer], block_size: int, window_shards: int, seed: int) -> None:
        """Fix the order.

        Args:
            counts: [S, B], samples of each bucket in each shard.
            block_size: samples per block; a multiple of ranks x micro-batch size.
            window_shards: shards whose samples are mixed with each other. Larger mixes more, smaller reads nearer.
            seed: any integer.
        Raises:
            DataError: there is no sample at all.
        """
        self._counts = np.asarray(counts, dtype=np.int64)
        if self._counts.ndim != 2 or (self._counts < 0).any():
            raise ValueError(f"counts must be [shards, buckets] and not negative, got shape {self._counts.shape}")
        if block_size < 1 or window_shards < 1:
            raise ValueError(f"block_size = {block_size} and window_shards = {window_shards} must be at least 1")
        self._num_shards, self._num_buckets = self._counts.shape
        self._totals = self._counts.sum(axis=0)
        if not self._totals.any():
            raise DataError("sample order: the data set has 0 samples; pack clips that fit a bucket first.")
        self.block_size = block_size
        self._window = window_shards
        self._schedule_seed = seed_of(seed, "schedule")
        self._shard_seed = seed_of(seed, "shards")
        self._sample_seed = seed_of(seed, "samples")
        self._plans: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def blocks_per_epoch(self, epoch: int) -> int:
        """Return how many blocks `epoch` has. May be 0 for a small data set, and differ by epoch."""
        return int(self._blocks_of(epoch).sum())

    def blocks(self, epoch: int = 0, block: int = 0) -> Iterator[Block]:
        """Yield blocks without end, starting at block number `block` of `epoch`.

        Raises:
            DataError: `epoch` has fewer than `block` blocks, so the state belongs to another data set.
        """
        if epoch < 0 or not 0 <= block <= self.blocks_per_epoch(epoch):
            raise DataError(
                f"sample order: cannot start at epoch {epoch}, block {block}; that epoch has blocks 0 to "
                f"{self.blocks_per_epoch(max(epoch, 0))}. The state belongs to other data or another batch size."
            )
        while True:
            buckets = self._schedule(epoch)
            done = epoch * self._totals // self.block_size
            done += np.bincount(buckets[:block], minlength=self._num_buckets)
            for number in range(block, len(buckets)):
                bucket = int(buckets[number])
                yield Block(epoch, number, bucket, int(done[bucket]) * self.block_size)
                done[bucket] += 1
            epoch, block = self._next_epoch(epoch), 0

    def at(self, bucket: int, position: int) -> SampleRef:
        """Return the sample at `position` (from 0) of the bucket's endless stream."""
        if not self._totals[bucket] or position < 0:
            raise IndexError(f"bucket {bucket} has {self._totals[bucket]} samples; no position {position}")
        epoch, rest = divmod(int(position), int(self._totals[bucket]))
        shards, before = self._plan(epoch)
        column = before[:, bucket]
        window = int(np.searchsorted(column[:: self._window], rest, "right")) - 1
        low = window * self._window
        start, end = int(column[low]), int(column[min(low + self._window, self._num_shards)])
        key = seed_of(self._sample_seed, epoch, bucket, window)
        place = start + _permute(rest - start, end - start, key)
        slot = int(np.searchsorted(column, place, "right")) - 1
        return SampleRef(epoch, int(shards[slot]), place - int(column[slot]))

    def _blocks_of(self, epoch: int) -> NDArray[np.int64]:
        """Blocks of each bucket in `epoch`, [B]: whole blocks reached by its end less those by its start."""
        return (epoch + 1) * self._totals // self.block_size - epoch * self._totals // self.block_size

    def _next_epoch(self, epoch: int) -> int:
        """Return the first epoch after `epoch` that has a block."""
        done = (epoch + 1) * self._totals // self.block_size
        # Epoch e holds a block of a bucket once (e + 1) * total reaches the next multiple of block_size.
        needed = [-(-(int(d) + 1) * self.block_size // int(n)) for d, n in zip(done, self._totals, strict=True) if n]
        return min(needed) - 1

    def _schedule(self, epoch: int) -> NDArray[np.int64]:
        """Bucket of every block of `epoch`."""
        buckets = np.repeat(np.arange(self._num_buckets), self._blocks_of(epoch))
        return buckets[_hash_permutation(len(buckets), seed_of(self._schedule_seed, epoch))]

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards in the order of `epoch`, [S], and each bucket's samples before every place in it, [S + 1, B]."""
        plan = self._plans.get(epoch)
        if plan is None:
            shards = _hash_permutation(self._num_shards, seed_of(self._shard_seed, epoch))
            before = np.zeros((self._num_shards + 1, self._num_buckets), np.int64)
            np.cumsum(self._counts[shards], axis=0, out=before[1:])
            plan = (shards, before)
            # Replaced rather than changed: reader threads look here at the same time.
            self._plans = {e: p for e, p in self._plans.items() if abs(e - epoch) <= 1} | {epoch: plan}
        return plan


def _mix_array(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`wan_dist.core.rng.mix` of every element."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _hash_permutation(n: int, key: int) -> NDArray[np.int64]:
    """Return a permutation of range(n). `mix` is a bijection, so no two hashes are equal."""
    return np.argsort(_mix_array(np.arange(n, dtype=np.uint64) ^ np.uint64(key)), kind="stable")


def _permute(i: int, n: int, key: int) -> int:
    """Return where a keyed permutation of range(n) sends `i`."""
    if n <= 1:
        return i
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = i >> half_bits, i & mask
        for k in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(key ^ (k << 56) ^ right) & mask)
        i = (left << half_bits) | right
        if i < n:
            return i
