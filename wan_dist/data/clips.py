"""The training view of packed shards: which clip is in which bucket, and its frames."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import av
import numpy as np
from numpy.typing import NDArray

from wan_dist.core.buckets import make_buckets, merge_small_buckets
from wan_dist.core.errors import DataError, UnfitDataError
from wan_dist.core.order import SampleOrder, Tail
from wan_dist.core.words import counted
from wan_dist.data.assign import DROP_REASONS, ClipRules, FrameChoice, assign_clips, explain_drops, time_window
from wan_dist.data.decode import DECODE_RULES, crop_window, frame_times
from wan_dist.data.decode_worker import Decoder, open_decoder
from wan_dist.data.index import ShardSet, open_shards
from wan_dist.data.located import ClipSample, LocatedClip
from wan_dist.data.masks import STILL_MAGIC
from wan_dist.data.mixture import MixedShards, ShardSource, mixing_rates
from wan_dist.data.reader import locate, read_captions, read_member

__all__ = ["ClipDataset", "ClipRules", "ClipSample", "LocatedClip"]

logger = logging.getLogger(__name__)

_CENTER: Final = (0.5, 0.5)


class ClipDataset:
    """Packed shards seen through `ClipRules`. Safe to use from several threads.

    Shards of several data sets are numbered one data set after the other.

    Attributes:
        buckets: every training shape, B of them.
        counts: [S, B], int64, clips of each bucket in each shard; what `SampleOrder` wants.
        drops: clips in no bucket, by reason.
        digest: changes with any byte of the shards and with any rule; a run resumes only on the same digest.
    """

    def __init__(
        self, shards: ShardSet | Sequence[MixedShards], rules: ClipRules, decoder: Decoder | None = None
    ) -> None:
        """Sort the clips of opened shards into buckets. `ClipDataset.open` is the usual way in.

        Args:
            shards: opened shards, of one data set or of several.
            rules: how clips become samples.
            decoder: turns files into frames; None decodes in this process.
        """
        self._mixed = [MixedShards(shards)] if isinstance(shards, ShardSet) else list(shards)
        self._decoder = decoder or open_decoder("thread")
        self._rules = rules
        self.buckets = make_buckets(rules.sizes, rules.num_frames)
        # Of each shard: its data set, and its number there.
        self._places = [(m, number) for m in self._mixed for number in range(len(m.shards.manifest.shards))]
        assigned = [assign_clips(m.shards.index(number), rules, len(self.buckets)) for m, number in self._places]
        # rows[shard][bucket]: rows of the shard's index, ascending.
        self._rows = [list(a.rows) for a in assigned]
        self.drops = dict(sum((Counter(a.drops) for a in assigned), Counter()))
        self._count()
        alone = len(self._mixed) == 1 and self._mixed[0].is_plain
        identity = self._mixed[0].shards.manifest.digest if alone else [m.identity() for m in self._mixed]
        content = json.dumps([identity, DECODE_RULES, rules.as_json()], sort_keys=True)
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._frame_rules = rules.allow_duplicate_frames, rules.consecutive
        self._decoder_name = f"{av.__version__}/{av.ffmpeg_version_info}/{DECODE_RULES}"

    @classmethod
    def open(
        cls,
        shards_dir: Path | str | Sequence[ShardSource],
        *,
        sizes: Sequence[tuple[int, int]],
        num_frames: Sequence[int],
        fps: float,
        frame_choice: FrameChoice = "head",
        crop: Literal["center", "random"] = "center",
        allow_duplicate_frames: bool = False,
        allow_upscale: bool = False,
        decoder: Decoder | None = None,
    ) -> "ClipDataset":
        """Open the shards of a folder and log which clips go where, and how many go nowhere.

        Args:
            shards_dir: folder or URL of what `wan-data pack` wrote, or several of them with their weights.
            sizes: (width, height) in px of the spatial buckets.
            num_frames: frames of the temporal buckets.
            fps: frames per second.
            frame_choice: which part of a longer clip is used.
            crop: which part is kept after the cover-resize.
            allow_duplicate_frames: use clips of too low a frame rate by repeating frames.
            allow_upscale: use clips smaller than their bucket.
            decoder: turns files into frames; None decodes in this process.
        Raises:
            DataError: the shards are damaged or unfinished, or no clip fits any bucket.
        """
        rules = ClipRules(
            tuple((w, h) for w, h in sizes),
            tuple(num_frames),
            fps,
            frame_choice,
            crop,
            allow_duplicate_frames,
            allow_upscale,
        )
        sources = [ShardSource(str(shards_dir))] if isinstance(shards_dir, Path | str) else shards_dir
        opened = [
            MixedShards(open_shards(s.path, s.cache), s.weight, s.repeats, s.loss_weight, s.kind) for s in sources
        ]
        dataset = cls(opened, rules, decoder)
        if not dataset.counts.any():
            indexes = [m.shards.index(number) for m, number in dataset._places]
            why = explain_drops(dataset.drops, indexes)
            raise UnfitDataError(f"{dataset.name}: none of {counted(dataset.num_clips, 'clip')} can be used: {why}.")
        logger.info("%s", dataset.table())
        return dataset

    def close(self) -> None:
        """End the decoder's processes, if it has any."""
        self._decoder.close()

    @property
    def name(self) -> str:
        """Where the clips come from, for messages."""
        return ", ".join(m.shards.name for m in self._mixed)

    @property
    def shard_sets(self) -> list[ShardSet]:
        """The opened data sets."""
        return [m.shards for m in self._mixed]

    @property
    def num_clips(self) -> int:
        """Clips in the shards, used or not."""
        return sum(m.shards.manifest.num_clips for m in self._mixed)

    def merge_small_buckets(self, block_size: int) -> None:
        """Empty buckets with fewer than `block_size` clips into their nearest neighbours, and log it."""
        totals = [int(n) for n in self.counts.sum(0)]
        targets = merge_small_buckets(self.buckets, totals, block_size, self._rules.allow_upscale)
        for rows in self._rows:
            for bucket, target in enumerate(targets):
                if bucket != target and len(rows[bucket]):
                    rows[target] = np.sort(np.concatenate([rows[target], rows[bucket]]))
                    rows[bucket] = rows[bucket][:0]
        for bucket, target in enumerate(targets):
            if bucket != target and totals[bucket]:
                logger.info("merged %d clips of %s into %s", totals[bucket], self.buckets[bucket], self.buckets[target])
        self._count()
        content = json.dumps([self.digest, "merge", block_size])
        self.digest = hashlib.sha256(content.encode()).hexdigest()

    def order(self, block_size: int, window_shards: int, seed: int, tail: Tail = "carry") -> SampleOrder:
        """Return the sample order over these clips; arguments and errors are those of `SampleOrder`."""
        return SampleOrder(
            self.counts,
            block_size,
            window_shards,
            seed,
            tail=tail,
            shards_per_dataset=[len(m.shards.manifest.shards) for m in self._mixed],
            rates=mixing_rates(self._mixed, self._clips_used()),
        )

    def loss_weight(self, shard: int) -> float:
        """Return what the loss of a shard's clips is multiplied by."""
        return self._places[shard][0].loss_weight

    def is_prior(self, shard: int) -> bool:
        """Return whether a shard's clips keep the model as it was, instead of teaching it."""
        return self._places[shard][0].kind == "prior"

    def has_mask(self, shard: int, row: int) -> bool:
        """Return whether the clip in a row of a shard's index has a mask."""
        mixed, local = self._places[shard]
        return bool(mixed.shards.index(local)[row]["mask_size"])

    def table(self) -> str:
        """Return lines that say how many clips each bucket has, and how many were left out and why."""
        head = f"{self.name}: {int(self.counts.sum())} of {counted(self.num_clips, 'clip')} used"
        lines = [
            f"  {b.width}x{b.height}, {b.num_frames} frames: {counted(int(n), 'clip')}"
            for b, n in zip(self.buckets, self.counts.sum(0), strict=True)
        ]
        drops = [f"  left out, {why}: {n} ({DROP_REASONS[why]})" for why, n in sorted(self.drops.items())]
        return "\n".join([head, *lines, *drops])

    def locate(
        self, bucket: int, shard: int, index: int, *, choice: float, crop_xy: tuple[float, float]
    ) -> LocatedClip:
        """Return a sample before it is decoded, so that a caller with its `cache_key` need not decode it.

        Args:
            bucket: number of its bucket.
            shard: number of the shard.
            index: number of the clip among those of the bucket in the shard.
            choice: draw from [0, 1) that places the window in time, if `frame_choice` leaves it to chance.
            crop_xy: draws from [0, 1) that place the crop, used if `crop` is `random`.
        Raises:
            DataError: its captions cannot be read.
        """
        mixed, local = self._places[shard]
        number = int(self._rows[shard][bucket][index])
        row = mixed.shards.index(local)[number]
        shape = self.buckets[bucket]
        fps, choice = time_window(int(row["num_frames"]), float(row["fps"]), shape, self._rules, choice)
        crop_xy = crop_xy if self._rules.crop == "random" else _CENTER
        captions = read_captions(mixed.shards.tar(local), row)
        window = crop_window(int(row["width"]), int(row["height"]), shape, crop_xy)
        content = [
            mixed.shards.manifest.shards[local].sha256,
            row["key"].decode(),
            [shape.width, shape.height, shape.num_frames, fps, *self._frame_rules],
            [choice, window.x, window.y],
            self._decoder_name,
        ]
        cache_key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return LocatedClip(row["key"].decode(), captions, cache_key, shape, shard, number, choice, crop_xy, fps)

    def row_of(self, bucket: int, shard: int, index: int) -> int:
        """Return the row of a clip in its shard's index; arguments are those of `locate`, which reads and hashes."""
        return int(self._rows[shard][bucket][index])

    def frames(self, clip: LocatedClip) -> NDArray[np.uint8]:
        """Return the frames of a located sample, [F, H, W, 3] RGB in 0..255.

        Raises:
            DataError: the clip is damaged.
        """
        mixed, local = self._places[clip.shard]
        where = locate(mixed.shards.tar(local), mixed.shards.index(local)[clip.row], "media")
        return self._decoder.decode(
            read_member(where),
            clip.bucket,
            fps=clip.fps,
            choice=clip.choice,
            crop_xy=clip.crop_xy,
            allow_duplicate_frames=self._rules.allow_duplicate_frames,
            consecutive=self._rules.consecutive,
            name=where.name,
        )

    def mask(self, clip: LocatedClip) -> NDArray[np.uint8] | None:
        """Return a located sample's mask, cropped as its frames: [F or 1, H, W, 3], white counts; None if it has none.

        Raises:
            DataError: the mask is damaged.
        """
        mixed, local = self._places[clip.shard]
        row = mixed.shards.index(local)[clip.row]
        if not row["mask_size"]:
            return None
        where = locate(mixed.shards.tar(local), row, "mask")
        content = read_member(where)
        still = content.startswith(STILL_MAGIC)
        return self._decoder.decode(
            content,
            replace(clip.bucket, num_frames=1) if still else clip.bucket,
            fps=clip.fps,
            choice=0.0 if still else clip.choice,
            crop_xy=clip.crop_xy,
            allow_duplicate_frames=self._rules.allow_duplicate_frames,
            consecutive=self._rules.consecutive,
            name=f"{where.name}: its mask",
        )

    def frame_times(self, clip: LocatedClip) -> list[float]:
        """Return when each frame of a located sample is shown in its file, seconds after its first frame.

        Raises:
            DataError: the clip is damaged.
        """
        mixed, local = self._places[clip.shard]
        where = locate(mixed.shards.tar(local), mixed.shards.index(local)[clip.row], "media")
        return frame_times(
            read_member(where),
            clip.bucket.num_frames,
            clip.fps,
            clip.choice,
            allow_duplicate_frames=self._rules.allow_duplicate_frames,
            consecutive=self._rules.consecutive,
            name=where.name,
        )

    def find(self, key: str) -> tuple[int, int, int]:
        """Return bucket, shard and index (as `locate` takes them) of a clip.

        Raises:
            DataError: there is no such clip, or it is in no bucket.
        """
        for shard, (mixed, local) in enumerate(self._places):
            for row in np.flatnonzero(mixed.shards.index(local)["key"] == key.encode()):
                for bucket, rows in enumerate(self._rows[shard]):
                    found = np.flatnonzero(rows == row)
                    if len(found):
                        return bucket, shard, int(found[0])
                raise DataError(f"{self.name}: sample {key} is in no bucket; `wan-data inspect --plan` says why.")
        raise DataError(f"{self.name}: no sample {key}; `wan-data inspect` a tar to see its keys.")

    def load(self, bucket: int, shard: int, index: int, *, choice: float, crop_xy: tuple[float, float]) -> ClipSample:
        """Return a decoded sample; arguments and errors are those of `locate` and `frames`."""
        clip = self.locate(bucket, shard, index, choice=choice, crop_xy=crop_xy)
        return ClipSample(clip.key, clip.captions, self.frames(clip), clip.cache_key)

    def _count(self) -> None:
        counts = [[len(r) for r in rows] for rows in self._rows]
        self.counts = np.array(counts, np.int64).reshape(-1, len(self.buckets))

    def _clips_used(self) -> list[int]:
        """Return the clips of each data set that are in a bucket."""
        sizes = [len(m.shards.manifest.shards) for m in self._mixed]
        return [int(part.sum()) for part in np.split(self.counts, np.cumsum(sizes)[:-1])]
