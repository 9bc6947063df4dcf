"""Decide before packing which clip goes into which shard, so that a shard depends on its inputs only."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Final

from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.shard_format import sample_keys
from wan_dist.data.source_files import Source

PLAN_VERSION: Final = 2
SHARD_NAME: Final = "data"


@dataclass(frozen=True)
class PlannedClip:
    """A clip and the key that it gets."""

    key: str
    source: Source


@dataclass(frozen=True)
class PackPlan:
    """Which clips go into each shard, in order.

    Attributes:
        shards: the clips of each shard. Clips that turn out unreadable leave their shard smaller and move no other.
        options: what the user chose about shards and clips.
        digest: SHA-256 of options, paths, sizes, times of change and captions.
    """

    shards: tuple[tuple[PlannedClip, ...], ...]
    options: dict[str, Any]
    digest: str

    @property
    def num_clips(self) -> int:
        """Clips in all shards."""
        return sum(map(len, self.shards))

    @property
    def num_bytes(self) -> int:
        """Size of all clips, bytes."""
        return sum(clip.source.num_bytes for shard in self.shards for clip in shard)

    def record(self) -> dict[str, object]:
        """Return what `plan.json` keeps: enough to say what changed, not every clip."""
        return {
            "version": PLAN_VERSION,
            "digest": self.digest,
            "options": self.options,
            "num_clips": self.num_clips,
            "num_bytes": self.num_bytes,
            "shards": [{"first": shard[0].source.path, "num_clips": len(shard)} for shard in self.shards],
        }


def shard_stem(shard: int) -> str:
    """Return the file name of shard number `shard`, without extension."""
    return f"{SHARD_NAME}-{shard:06d}"


def plan_pack(
    sources: tuple[Source, ...], shard_bytes: int, shard_clips: int, rules: ClipRules | None = None
) -> PackPlan:
    """Return the plan for `sources`.

    Args:
        sources: in the order in which they are packed.
        shard_bytes: a shard is full once its clips have this many bytes.
        shard_clips: a shard is full once it has this many clips.
        rules: what is done to every clip; None only copies.
    """
    rules = rules or ClipRules()
    keys = sample_keys((source.path for source in sources), with_pieces=rules.splits)
    clips = [PlannedClip(keys[source.path], source) for source in sources]
    options = {"shard_bytes": shard_bytes, "shard_clips": shard_clips, **rules.record()}
    content = [PLAN_VERSION, options, [[clip.key, *astuple(clip.source)] for clip in clips]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return PackPlan(tuple(_full_shards(clips, shard_bytes, shard_clips)), options, digest)


def _full_shards(clips: list[PlannedClip], shard_bytes: int, shard_clips: int) -> Iterator[tuple[PlannedClip, ...]]:
    shard: list[PlannedClip] = []
    size = 0
    for clip in clips:
        shard.append(clip)
        size += clip.source.num_bytes
        if size >= shard_bytes or len(shard) >= shard_clips:
            yield tuple(shard)
            shard, size = [], 0
    if shard:
        yield tuple(shard)
