"""The training view of packed shards: which clip is in which bucket, and its frames."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import av
import numpy as np
from numpy.typing import NDArray

from wan_dist.core import buckets as bucket_rules
from wan_dist.core.buckets import Bucket, assign_bucket, make_buckets
from wan_dist.core.errors import DataError
from wan_dist.data import timing
from wan_dist.data.decode import DECODE_RULES, crop_window, decode_clip
from wan_dist.data.index import ShardSet, open_shards
from wan_dist.data.reader import locate, read_json, read_member

logger = logging.getLogger(__name__)

DROP_REASONS: Final = {**bucket_rules.REASONS, **timing.REASONS}

_FRAME_CHOICES: Final = {"head": 0.0, "center": 0.5}
_CENTER: Final = (0.5, 0.5)


@dataclass(frozen=True)
class LocatedClip:
    """One clip as one training sample will see it, not yet decoded.

    Attributes:
        key: its key in the shard.
        captions: at least one.
        cache_key: names exactly the pixels of `ClipDataset.frames`.
        bucket: the shape of its frames.
        shard: shard number.
        row: row in the shard's index.
        choice: place of the window in time, in [0, 1).
        crop_xy: place of the crop, in [0, 1) along width and height.
    """

    key: str
    captions: tuple[str, ...]
    cache_key: str
    bucket: Bucket
    shard: int
    row: int
    choice: float
    crop_xy: tuple[float, float]


@dataclass(frozen=True)
class ClipSample:
    """One training sample.

    Attributes:
        key: its key in the shard.
        captions: at least one.
        frames: [F, H, W, 3], uint8 RGB.
        cache_key: names exactly these pixels; what is computed from them may be kept under it.
    """

    key: str
    captions: tuple[str, ...]
    frames: NDArray[np.uint8]
    cache_key: str


@dataclass(frozen=True)
class ClipRules:
    """How clips become samples; the fields of `wan_dist.config.schema.DataConfig` of the same names.

    Attributes:
        sizes: (width, height) in px of the spatial buckets.
        num_frames: frames of the temporal buckets.
        fps: frames per second.
        frame_choice: which part of a longer clip is used.
        crop: which part is kept after the cover-resize.
        allow_duplicate_frames: use clips of too low a frame rate.
        allow_upscale: use clips smaller than their bucket.
    """

    sizes: tuple[tuple[int, int], ...]
    num_frames: tuple[int, ...]
    fps: float
    frame_choice: Literal["head", "center", "random"]
    crop: Literal["center", "random"]
    allow_duplicate_frames: bool
    allow_upscale: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return json.loads(json.dumps(self.__dict__))


class ClipDataset:
    """Packed shards seen through `ClipRules`. Safe to use from several threads.

    Attributes:
        buckets: every training shape, B of them.
        counts: [S, B], int64, clips of each bucket in each shard; what `SampleOrder` wants.
        drops: clips in no bucket, by reason.
        digest: changes with any byte of the shards and with any rule; a run resumes only on the same digest.
    """

    def __init__(self, shards: ShardSet, rules: ClipRules) -> None:
        """Sort the clips of opened shards into buckets. `ClipDataset.open` is the usual way in."""
        self._shards = shards
        self._rules = rules
        self.buckets = make_buckets(rules.sizes, rules.num_frames)
        self.drops: dict[str, int] = {}
        # rows[shard][bucket]: rows of the shard's index, ascending.
        self._rows = [self._sort_shard(shard) for shard in range(len(shards.manifest.shards))]
        self.counts = np.array([[len(r) for r in rows] for rows in self._rows], np.int64).reshape(-1, len(self.buckets))
        content = json.dumps([shards.manifest.digest, DECODE_RULES, rules.as_json()], sort_keys=True)
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._decoder = f"{av.__version__}/{av.ffmpeg_version_info}/{DECODE_RULES}"

    @classmethod
    def open(
        cls,
        shards_dir: Path,
        *,
        sizes: Sequence[tuple[int, int]],
        num_frames: Sequence[int],
        fps: float,
        frame_choice: Literal["head", "center", "random"] = "head",
        crop: Literal["center", "random"] = "center",
        allow_duplicate_frames: bool = False,
        allow_upscale: bool = False,
    ) -> "ClipDataset":
        """Open the shards of a folder and log which clips go where, and how many go nowhere.

        Args:
            shards_dir: folder written by `wan-data pack`.
            sizes: (width, height) in px of the spatial buckets.
            num_frames: frames of the temporal buckets.
            fps: frames per second.
            frame_choice: which part of a longer clip is used.
            crop: which part is kept after the cover-resize.
            allow_duplicate_frames: use clips of too low a frame rate by repeating frames.
            allow_upscale: use clips smaller than their bucket.
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
        dataset = cls(open_shards(Path(shards_dir)), rules)
        if not dataset.counts.any():
            raise DataError(f"{shards_dir}: none of {dataset.num_clips} clips can be used: {dataset._explain_drops()}.")
        logger.info("%s", dataset.table())
        return dataset

    @property
    def num_clips(self) -> int:
        """Clips in the shards, used or not."""
        return self._shards.manifest.num_clips

    def table(self) -> str:
        """Return lines that say how many clips each bucket has, and how many were left out and why."""
        head = f"{self._shards.folder}: {int(self.counts.sum())} of {self.num_clips} clips used"
        lines = [
            f"  {b.width}x{b.height}, {b.num_frames} frames: {n} clips"
            for b, n in zip(self.buckets, self.counts.sum(0), strict=True)
        ]
        drops = [f"  left out, {why}: {n} ({DROP_REASONS[why]})" for why, n in sorted(self.drops.items())]
        return "\n".join([head, *lines, *drops])

    def locate(
        self, bucket: int, shard: int, index: int, *, choice: float, crop_xy: tuple[float, float]
    ) -> LocatedClip:
        """Return a sample before it is decoded, so that a caller with its `cache_key` need not decode it.

        Args:
            bucket: number of the bucket.
            shard: number of the shard.
            index: number of the clip among those of the bucket in the shard.
            choice: draw from [0, 1) that places the window in time, used if `frame_choice` is `random`.
            crop_xy: draws from [0, 1) that place the crop, used if `crop` is `random`.
        Raises:
            DataError: its captions cannot be read.
        """
        number = int(self._rows[shard][bucket][index])
        row = self._shards.index(shard)[number]
        shape = self.buckets[bucket]
        choice = _FRAME_CHOICES.get(self._rules.frame_choice, choice)
        crop_xy = crop_xy if self._rules.crop == "random" else _CENTER
        described = read_json(locate(self._shards.tar_path(shard), row, "json"))
        window = crop_window(int(row["width"]), int(row["height"]), shape, crop_xy)
        content = [
            self._shards.manifest.shards[shard].sha256,
            row["key"].decode(),
            [shape.width, shape.height, shape.num_frames, self._rules.fps, self._rules.allow_duplicate_frames],
            [choice, window.x, window.y],
            self._decoder,
        ]
        cache_key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return LocatedClip(
            row["key"].decode(), tuple(described["captions"]), cache_key, shape, shard, number, choice, crop_xy
        )

    def frames(self, clip: LocatedClip) -> NDArray[np.uint8]:
        """Return the frames of a located sample, [F, H, W, 3] RGB in 0..255.

        Raises:
            DataError: the clip is damaged.
        """
        where = locate(self._shards.tar_path(clip.shard), self._shards.index(clip.shard)[clip.row], "media")
        return decode_clip(
            read_member(where),
            clip.bucket,
            fps=self._rules.fps,
            choice=clip.choice,
            crop_xy=clip.crop_xy,
            allow_duplicate_frames=self._rules.allow_duplicate_frames,
            name=where.name,
        )

    def load(self, bucket: int, shard: int, index: int, *, choice: float, crop_xy: tuple[float, float]) -> ClipSample:
        """Return a decoded sample; arguments and errors are those of `locate` and `frames`."""
        clip = self.locate(bucket, shard, index, choice=choice, crop_xy=crop_xy)
        return ClipSample(clip.key, clip.captions, self.frames(clip), clip.cache_key)

    def _sort_shard(self, shard: int) -> list[NDArray[np.int64]]:
        """Return the rows of each bucket, B arrays, and count the clips that go into none."""
        fields = self._shards.index(shard)[["width", "height", "num_frames", "fps", "max_gap_s"]]
        # Clips of a data set share few sizes and lengths; the rules are applied once to each.
        kinds, kind_of = np.unique(fields, return_inverse=True)
        placed = [self._place(kind) for kind in kinds]
        sizes = np.bincount(kind_of, minlength=len(kinds))
        drops = Counter(self.drops)
        for place, count in zip(placed, sizes, strict=True):
            if isinstance(place, str):
                drops[place] += int(count)
        self.drops = dict(drops)
        bucket_of = np.array([p if isinstance(p, int) else -1 for p in placed], np.int64)[kind_of]
        return [np.flatnonzero(bucket_of == bucket) for bucket in range(len(self.buckets))]

    def _place(self, kind: np.void) -> int | str:
        """Return the bucket of a clip, or a key of `DROP_REASONS`."""
        rules, source_fps = self._rules, float(kind["fps"])
        problem = timing.timing_problem(source_fps, float(kind["max_gap_s"]), rules.fps, rules.allow_duplicate_frames)
        if problem:
            return problem
        available = timing.available_frames(
            int(kind["num_frames"]), source_fps, rules.fps, rules.allow_duplicate_frames
        )
        size = int(kind["width"]), int(kind["height"])
        return assign_bucket(*size, available, rules.sizes, rules.num_frames, rules.allow_upscale)

    def _explain_drops(self) -> str:
        """Say why clips were left out, and what the clips are like."""
        reasons = "; ".join(f"{count} {why}: {DROP_REASONS[why]}" for why, count in sorted(self.drops.items()))
        rows = np.concatenate([np.asarray(self._shards.index(s)) for s in range(len(self._rows))])
        ranges = (
            f"{rows[name].min():.4g} to {rows[name].max():.4g} {unit}"
            for name, unit in (("width", "px wide"), ("height", "px high"), ("num_frames", "frames"), ("fps", "fps"))
        )
        return f"{reasons}. The clips have {', '.join(ranges)}"
