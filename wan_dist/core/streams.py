"""The endless sample streams of one data set: for every bucket, one permutation of its samples after another.

Inside an epoch shards are permuted and taken `window_shards` at a time; the samples of a window are permuted by a
Feistel network with cycle walking, so that no array of the data set's length exists; what its rounds can return, a
number for each half of the bits, is looked up. Measured at 1e8 samples in 1e5 shards, on two shared CPU cores:
2 us per sample and 46 MiB, against 800 MB per rank for a stored permutation.

Source: cycle walking, Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains".
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.rng import seed_of

_FEISTEL_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where one sample lies.

    Attributes:
        epoch: how often the bucket's samples of this data set were gone through before this sample.
        shard: shard number.
        index: number of the sample among those of its bucket within the shard.
    """

    epoch: int
    shard: int
    index: int


@dataclass(frozen=True, slots=True)
class _Window:
    """Shards whose samples of one bucket are permuted with each other.

    Attributes:
        epoch: epoch of the bucket's stream.
        start: samples of the epoch before it.
        end: samples of the epoch up to its end.
        permutation: of its samples.
        before: samples of the epoch before each of its shards.
        shards: their numbers.
    """

    epoch: int
    start: int
    end: int
    permutation: "_Permutation"
    before: list[int]
    shards: list[int]


class BucketStreams:
    """One endless stream per bucket. Safe to use from several threads.

    Attributes:
        totals: [B], int64, samples of each bucket.
    """

    def __init__(self, counts: NDArray[np.int64], first_shard: int, window_shards: int, seed: int) -> None:
        """Fix the streams.

        Args:
            counts: [S, B], samples of each bucket in each shard.
            first_shard: number of the first of these shards.
            window_shards: shards whose samples are mixed with each other. Larger mixes more, smaller reads nearer.
            seed: any integer.
        """
        self._counts = counts
        self._first_shard = first_shard
        self._num_shards = len(counts)
        self.totals = counts.sum(axis=0)
        self._window = window_shards
        self._shard_seed = seed_of(seed, "shards")
        self._sample_seed = seed_of(seed, "samples")
        self._plans: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._lengths = self.totals.tolist()
        # Of each bucket, the window used last: neighbours in a stream share it.
        self._last_window: dict[int, _Window] = {}

    def at(self, bucket: int, position: int) -> SampleRef:
        """Return the sample at `position` (from 0) of the bucket's endless stream."""
        if not self._lengths[bucket] or position < 0:
            raise IndexError(f"bucket {bucket} has {self.totals[bucket]} samples; no position {position}")
        epoch, rest = divmod(int(position), self._lengths[bucket])
        window = self._last_window.get(bucket)
        if window is None or window.epoch != epoch or not window.start <= rest < window.end:
            window = self._last_window[bucket] = self._window_at(bucket, epoch, rest)
        place = window.start + window.permutation.of(rest - window.start)
        slot = bisect_right(window.before, place) - 1
        return SampleRef(epoch, window.shards[slot], place - window.before[slot])

    def _window_at(self, bucket: int, epoch: int, rest: int) -> "_Window":
        """Return the window that holds sample number `rest` of the bucket's permutation in `epoch`."""
        shards, before = self._plan(epoch)
        column = before[:, bucket]
        number = int(np.searchsorted(column[:: self._window], rest, "right")) - 1
        low = number * self._window
        high = min(low + self._window, self._num_shards)
        start, end = int(column[low]), int(column[high])
        return _Window(
            epoch,
            start,
            end,
            _Permutation(end - start, seed_of(self._sample_seed, epoch, bucket, number)),
            column[low:high].tolist(),
            [self._first_shard + shard for shard in shards[low:high].tolist()],
        )

    def _plan(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shards in the order of `epoch`, [S], and each bucket's samples before every place in it, [S + 1, B]."""
        plan = self._plans.get(epoch)
        if plan is None:
            shards = hash_permutation(self._num_shards, seed_of(self._shard_seed, epoch))
            before = np.zeros((self._num_shards + 1, len(self.totals)), np.int64)
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


def hash_permutation(n: int, key: int) -> NDArray[np.int64]:
    """Return a permutation of range(n), [n]. `mix` is a bijection, so no two hashes are equal."""
    return np.argsort(_mix_array(np.arange(n, dtype=np.uint64) ^ np.uint64(key)), kind="stable")


class _Permutation:
    """A keyed permutation of range(n), in memory for about 8 sqrt(n) numbers."""

    def __init__(self, n: int, key: int) -> None:
        self._n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        halves = np.arange(self._mask + 1, dtype=np.uint64)
        # Of every round, what it mixes into the left half for each right half.
        self._rounds = [
            (_mix_array(halves ^ np.uint64(key ^ (k << 56))) & np.uint64(self._mask)).tolist()
            for k in range(_FEISTEL_ROUNDS)
        ]

    def of(self, i: int) -> int:
        """Return where `i` is sent."""
        if self._n <= 1:
            return i
        half_bits, mask = self._half_bits, self._mask
        first, second, third, fourth = self._rounds
        while True:
            left, right = i >> half_bits, i & mask
            left ^= first[right]
            right ^= second[left]
            left ^= third[right]
            right ^= fourth[left]
            i = (left << half_bits) | right
            if i < self._n:
                return i
