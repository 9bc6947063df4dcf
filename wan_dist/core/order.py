"""The order in which training visits samples: bucketed, exactly once per epoch, resumable from two integers.

Every bucket has an endless stream (`wan_dist.core.streams`; those of several data sets are interleaved by
`wan_dist.core.mixing`). The stream is cut into blocks of `block_size` samples, so a block has one shape for every
rank. Which bucket a block uses is a permutation of its own. Nothing depends on the number of ranks or on history, so
1, 2 or 8 ranks visit the same samples, and a run resumes from `(epoch, block)` without replaying.

Where a bucket's epoch is no multiple of `block_size`, a tail is left over, and one of these happens to it:

- carry: it begins the next epoch's first block, so nothing is dropped or repeated.
- pad: it gets a block of its own, filled with samples that weigh nothing, so that every epoch is exact.
- drop: it is left out of this epoch; the next epoch's permutation leaves out others.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.errors import DataError
from wan_dist.core.mixing import Interleave
from wan_dist.core.rng import seed_of
from wan_dist.core.streams import BucketStreams, SampleRef, hash_permutation

__all__ = ["Block", "SampleOrder", "SampleRef", "Tail"]

Tail = Literal["carry", "pad", "drop"]


@dataclass(frozen=True, slots=True)
class Block:
    """`block_size` consecutive samples of one bucket.

    Attributes:
        epoch: epoch of the schedule, from 0.
        block: number of this block within the epoch, from 0.
        bucket: the bucket that all its samples share.
        first: position of its first sample in the bucket's endless stream.
        num_padding: samples at its end that fill it up and must not count.
    """

    epoch: int
    block: int
    bucket: int
    first: int
    num_padding: int = 0


class SampleOrder:
    """The endless sample order over bucketed, sharded data sets. Safe to use from several threads."""

    def __init__(
        self,
        counts: NDArray[np.integer],
        block_size: int,
        window_shards: int,
        seed: int,
        *,
        tail: Tail = "carry",
        shards_per_dataset: Sequence[int] | None = None,
        rates: Sequence[Fraction] | None = None,
    ) -> None:
        """Fix the order.

        Args:
            counts: [S, B], samples of each bucket in each shard; the shards of a data set are adjacent.
            block_size: samples per block; a multiple of ranks x micro-batch size.
            window_shards: shards whose samples are mixed with each other. Larger mixes more, smaller reads nearer.
            seed: any integer.
            tail: what happens to samples that do not fill a block.
            shards_per_dataset: shards of each data set, D of them, S in sum; None for one data set.
            rates: how often each data set's samples come per epoch, D of them, above 0; None for once.
        Raises:
            DataError: there is no sample at all, or no bucket fills a block and `tail` is drop.
        """
        self._counts = np.asarray(counts, dtype=np.int64)
        if self._counts.ndim != 2 or (self._counts < 0).any():
            raise ValueError(f"counts must be [shards, buckets] and not negative, got shape {self._counts.shape}")
        if block_size < 1 or window_shards < 1:
            raise ValueError(f"block_size = {block_size} and window_shards = {window_shards} must be at least 1")
        num_shards = [len(self._counts)] if shards_per_dataset is None else list(shards_per_dataset)
        rates = [Fraction(1)] * len(num_shards) if rates is None else rates
        if sum(num_shards) != len(self._counts) or len(rates) != len(num_shards) or min(rates) <= 0:
            raise ValueError(f"shards_per_dataset {num_shards} and rates {rates} do not fit {len(self._counts)} shards")
        if not self._counts.any():
            raise DataError("sample order: the data set has 0 samples; pack clips that fit a bucket first.")
        self.block_size, self._tail = block_size, tail
        self._schedule_seed = seed_of(seed, "schedule")
        starts = np.concatenate([[0], np.cumsum(num_shards)])
        self._streams = [
            # The first data set's streams are those that it has alone.
            BucketStreams(self._counts[a:b], a, window_shards, seed_of(seed, "dataset", d) if d else seed)
            for d, (a, b) in enumerate(itertools.pairwise(starts.tolist()))
        ]
        self._set_rates(rates)
        if tail == "drop" and max(self._per_epoch) < block_size:
            raise DataError(
                f"sample order: tail = drop leaves nothing: the fullest bucket has {float(max(self._per_epoch)):g} "
                f"samples per epoch, a block {block_size}; use carry, pad or merge, or a smaller batch."
            )

    def _set_rates(self, rates: Sequence[Fraction]) -> None:
        """Set what each bucket has per epoch, [B], and how its data sets are interleaved."""
        num_buckets = self._counts.shape[1]
        # [D, B], samples per epoch.
        shares = [[rate * int(n) for n in streams.totals] for rate, streams in zip(rates, self._streams, strict=True)]
        self._per_epoch = [sum((share[b] for share in shares), Fraction(0)) for b in range(num_buckets)]
        self._mixes: list[Interleave | None] = [None] * num_buckets
        if len(shares) > 1:
            for b, total in enumerate(self._per_epoch):
                if total:
                    scale = math.lcm(*(share[b].denominator for share in shares))
                    self._mixes[b] = Interleave([int(share[b] * scale) for share in shares])

    def blocks_per_epoch(self, epoch: int) -> int:
        """Return how many blocks `epoch` has. May be 0 for a small data set, and differ by epoch."""
        return sum(self._blocks_of(epoch))

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
            done = np.bincount(buckets[:block], minlength=len(self._per_epoch)).tolist()
            first = [self._first(epoch, bucket) for bucket in range(len(self._per_epoch))]
            end = [math.floor((epoch + 1) * n) for n in self._per_epoch]
            for number in range(block, len(buckets)):
                bucket = int(buckets[number])
                start = first[bucket] + done[bucket] * self.block_size
                padding = max(0, start + self.block_size - end[bucket]) if self._tail == "pad" else 0
                yield Block(epoch, number, bucket, start, padding)
                done[bucket] += 1
            epoch, block = self._next_epoch(epoch), 0

    def at(self, bucket: int, position: int) -> SampleRef:
        """Return the sample at `position` (from 0) of the bucket's endless stream."""
        mix = self._mixes[bucket]
        dataset, position = mix.at(position) if mix and position >= 0 else (0, position)
        return self._streams[dataset].at(bucket, position)

    def samples_per_epoch(self) -> list[float]:
        """Return the mean number of samples of each bucket in an epoch, B of them, before tails are dropped."""
        return [float(n) for n in self._per_epoch]

    def _first(self, epoch: int, bucket: int) -> int:
        """Position of the first sample of a bucket's first block in `epoch`."""
        before = epoch * self._per_epoch[bucket]
        if self._tail == "carry":
            return math.floor(before / self.block_size) * self.block_size
        return math.floor(before)

    def _blocks_of(self, epoch: int) -> list[int]:
        """Blocks of each bucket in `epoch`, B of them."""
        if self._tail == "carry":
            # Whole blocks reached by its end less those by its start.
            size = self.block_size
            return [math.floor((epoch + 1) * n / size) - math.floor(epoch * n / size) for n in self._per_epoch]
        samples = [math.floor((epoch + 1) * n) - math.floor(epoch * n) for n in self._per_epoch]
        filled = self.block_size - 1 if self._tail == "pad" else 0
        return [(n + filled) // self.block_size for n in samples]

    def _next_epoch(self, epoch: int) -> int:
        """Return the first epoch after `epoch` that has a block."""
        if self._tail != "carry":
            epoch += 1
            while not any(self._blocks_of(epoch)):
                epoch += 1
            return epoch
        # Epoch e holds a block of a bucket once (e + 1) * n reaches the next multiple of block_size.
        size = self.block_size
        needed = [math.ceil((math.floor((epoch + 1) * n / size) + 1) * size / n) for n in self._per_epoch if n]
        return min(needed) - 1

    def _schedule(self, epoch: int) -> NDArray[np.int64]:
        """Bucket of every block of `epoch`."""
        buckets = np.repeat(np.arange(len(self._per_epoch)), self._blocks_of(epoch))
        return buckets[hash_permutation(len(buckets), seed_of(self._schedule_seed, epoch))]
