"""Several data sets in one run: how often each one's clips come, and what is held out of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from wan_dist.core.errors import DataError
from wan_dist.data.index import ShardSet
from wan_dist.data.stores import CacheLimits

_MAX_DENOMINATOR = 1_000_000


@dataclass(frozen=True)
class ShardSource:
    """One data set as a config names it.

    Attributes:
        path: folder or URL of its shards.
        weight: its share of the samples, relative to the other data sets' weights; None goes by size.
        repeats: how often each of its clips comes per epoch.
        loss_weight: what the loss of its clips is multiplied by.
        cache: where parts of remote shards are kept; None keeps nothing.
        kind: what its clips are for: train, or prior to keep what the model gives for them.
    """

    path: Path | str
    weight: float | None = None
    repeats: float = 1.0
    loss_weight: float = 1.0
    cache: CacheLimits | None = None
    kind: Literal["train", "prior"] = "train"


@dataclass(frozen=True)
class MixedShards:
    """One opened data set; attributes as of `ShardSource`."""

    shards: ShardSet
    weight: float | None = None
    repeats: float = 1.0
    loss_weight: float = 1.0
    kind: Literal["train", "prior"] = "train"

    @property
    def is_plain(self) -> bool:
        """Whether each of its clips comes once per epoch, weighs 1 and is learned."""
        return (self.repeats, self.loss_weight, self.kind) == (1.0, 1.0, "train")

    def identity(self) -> list[Any]:
        """Return what decides which samples come from it, as JSON values."""
        prior = ["prior"] if self.kind == "prior" else []
        return [self.shards.manifest.digest, self.weight, self.repeats, self.loss_weight, *prior]


def mixing_rates(mixed: Sequence[MixedShards], num_clips: Sequence[int]) -> list[Fraction]:
    """Return how often the clips of each data set come per epoch.

    Without weights this is `repeats`. With them, an epoch has as many samples as it would have without, and each data
    set the share of them that its weight says.

    Args:
        mixed: the data sets.
        num_clips: clips of each that are in a bucket.
    Raises:
        DataError: a data set has no clip that can be used.
    """
    for m, count in zip(mixed, num_clips, strict=True):
        if not count:
            raise DataError(f"{m.shards.name}: none of its clips can be used; remove it from data.shards.")
    repeats = [_fraction(m.repeats) for m in mixed]
    if all(m.weight is None for m in mixed):
        return repeats
    weights = [_fraction(1.0 if m.weight is None else m.weight) for m in mixed]
    epoch = sum(r * n for r, n in zip(repeats, num_clips, strict=True))
    return [w / sum(weights) * epoch / n for w, n in zip(weights, num_clips, strict=True)]


def check_held_out(training: Sequence[ShardSet], held_out: Sequence[ShardSet]) -> None:
    """Return if no validation clip is among the training clips, by key or by content.

    Raises:
        DataError: some are; it names the first.
    """
    keys = np.concatenate([_rows(shards, "key") for shards in held_out])
    content = np.concatenate([_rows(shards, "content") for shards in held_out])
    for shards in training:
        for kind, wanted in (("key", keys), ("content", content)):
            shared = wanted[np.isin(wanted, _rows(shards, kind))]
            if len(shared):
                first = shared[0].decode() if kind == "key" else _key_of(held_out, shared[0])
                raise DataError(
                    f"data.validation: {len(shared)} clips have the same {kind} as clips of {shards.name}, first "
                    f"{first}; a clip is either trained on or held out: pack them apart."
                )


def _rows(shards: ShardSet, kind: str) -> Any:
    """Return the keys of all clips, or what tells their files' contents apart: size and CRC-32 in one number."""
    indexes = [shards.index(number) for number in range(len(shards.manifest.shards))]
    if kind == "key":
        return np.concatenate([np.asarray(index["key"]) for index in indexes])
    return np.concatenate([(index["media_size"] << np.uint64(32)) | index["media_crc32"] for index in indexes])


def _key_of(held_out: Sequence[ShardSet], content: np.uint64) -> str:
    for shards in held_out:
        found = np.flatnonzero(_rows(shards, "content") == content)
        if len(found):
            return _rows(shards, "key")[found[0]].decode()
    raise AssertionError("the content was found a moment ago")


def _fraction(value: float) -> Fraction:
    return Fraction(value).limit_denominator(_MAX_DENOMINATOR)
