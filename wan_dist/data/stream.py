"""Read tars of other programs from end to end with `webdataset`, without index or manifest.

What it cannot promise, because nothing is known before it is read: that every sample comes once per epoch on any
number of ranks, that a resumed run sees what a straight one would have, that a shard that was cut short is noticed.
Each rank reads its own shards in its own order; `wan-data index` or `wan-data pack` give all of that back.
"""

import hashlib
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.buckets import make_buckets
from wan_dist.core.errors import DataError
from wan_dist.core.rng import seed_of, uniform
from wan_dist.data.assign import ClipRules, place_clip, time_window
from wan_dist.data.decode_worker import Decoder
from wan_dist.data.probe import ClipInfo, Reject
from wan_dist.data.probe_worker import Prober
from wan_dist.data.reader import CAPTION_KEYS
from wan_dist.data.reindex import media_extension, probe_bytes
from wan_dist.data.stores import StoredFile, is_remote, open_store, open_stream
from wan_dist.data.tar_walk import member_named

logger = logging.getLogger(__name__)

SHUFFLE_SAMPLES: Final = 256


class StreamedClip(NamedTuple):
    """One clip out of a stream, not yet decoded."""

    key: str
    captions: tuple[str, ...]
    bucket: int
    content: bytes
    info: ClipInfo


class _WebDataset(NamedTuple):
    """The functions of webdataset that are used."""

    expand_urls: Callable[..., Any]
    tar_file_expander: Callable[..., Any]
    group_by_keys: Callable[..., Any]
    shuffle: Callable[..., Any]


class ClipStream:
    """The clips of some tars, endlessly, each rank's own.

    Attributes:
        buckets: every training shape.
        rejects: samples that could not be used so far, by reason.
        digest: changes with the names of the tars and with any rule.
    """

    def __init__(self, tars: Sequence[Path | str], rules: ClipRules, decoder: Decoder) -> None:
        """List the tars; nothing is read yet.

        Args:
            tars: paths or URLs with braces such as `data-{000000..000099}.tar`, or folders of tars.
            rules: how clips become samples.
            decoder: turns files into frames.
        Raises:
            DataError: no tar is there, or a URL is of an unknown kind.
        """
        self._webdataset = _secure_webdataset()
        self._tars = [tar for name in tars for tar in self._expand(str(name))]
        self._rules, self._decoder = rules, decoder
        self.buckets = make_buckets(rules.sizes, rules.num_frames)
        self.rejects: Counter[str] = Counter()
        content = json.dumps(["stream", self._tars, rules.as_json()], sort_keys=True)
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        logger.warning(
            "streaming %d tars: samples may repeat or be left out when the run resumes or the number of ranks changes, "
            "and a tar that was cut short is not noticed; `wan-data index` removes these limits",
            len(self._tars),
        )

    def close(self) -> None:
        """End the decoder's processes."""
        self._decoder.close()

    def clips(self, rank: int, world_size: int, seed: int) -> Iterator[StreamedClip]:
        """Yield this rank's clips without end, in another order with every pass.

        Raises:
            DataError: a whole pass had no clip that can be used.
        """
        with Prober() as prober:
            number = 0
            while True:
                found = 0
                for sample in self._samples(rank, world_size, seed_of(seed, "pass", number)):
                    clip = self._clip(sample, prober)
                    if isinstance(clip, Reject):
                        self.rejects[clip.code] += 1
                        logger.warning("left out %s: %s: %s", clip.path, clip.code, clip.hint)
                    else:
                        found += 1
                        yield clip
                if not found:
                    reasons = (
                        ", ".join(f"{count} {code}" for code, count in sorted(self.rejects.items())) or "no samples"
                    )
                    raise DataError(f"{self._tars[0]} and others: no clip that can be used ({reasons}).")
                number += 1

    def frames(self, clip: StreamedClip, choice: float, crop_xy: tuple[float, float]) -> NDArray[np.uint8]:
        """Return the frames of a clip, [F, H, W, 3] RGB in 0..255; arguments as of `ClipDataset.locate`.

        Raises:
            DataError: the clip is damaged.
        """
        shape = self.buckets[clip.bucket]
        fps, choice = time_window(clip.info.num_frames, clip.info.fps, shape, self._rules, choice)
        return self._decoder.decode(
            clip.content,
            shape,
            fps=fps,
            choice=choice,
            crop_xy=crop_xy if self._rules.crop == "random" else (0.5, 0.5),
            allow_duplicate_frames=self._rules.allow_duplicate_frames,
            consecutive=self._rules.consecutive,
            name=clip.key,
        )

    def _expand(self, name: str) -> list[str]:
        tars: list[str] = self._webdataset.expand_urls(name)
        if not is_remote(name) and Path(name).is_dir():
            tars = sorted(str(path) for path in Path(name).glob("*.tar"))
        missing = [tar for tar in tars if not is_remote(tar) and not Path(tar).is_file()]
        if missing or not tars:
            raise DataError(f"data.shards = {name}: no such tar: {', '.join(missing[:3]) or name}; check the path.")
        return tars

    def _samples(self, rank: int, world_size: int, seed: int) -> Iterator[dict[str, Any]]:
        """Yield the raw samples of one pass."""
        order = random.Random(seed)
        tars = order.sample(self._tars, len(self._tars))
        by_shard = len(tars) >= world_size
        streams = ({"url": tar, "stream": _open(tar)} for tar in (tars[rank::world_size] if by_shard else tars))
        files = self._webdataset.tar_file_expander(streams, handler=self._broken)
        samples = self._webdataset.group_by_keys(files, handler=self._broken)
        if not by_shard:
            samples = (sample for number, sample in enumerate(samples) if number % world_size == rank)
        return self._webdataset.shuffle(SHUFFLE_SAMPLES, initial=SHUFFLE_SAMPLES, rng=order)(samples)

    def _broken(self, error: Exception) -> bool:
        """Note a tar that cannot be read on, and go on with the next."""
        self.rejects["broken_tar"] += 1
        logger.warning("left out the rest of a tar: %s", error)
        return True

    def _clip(self, sample: dict[str, Any], prober: Prober) -> StreamedClip | Reject:
        name = f"{sample['__url__']}: sample {sample['__key__']}"
        extension = media_extension(sample)
        captions = _captions(sample)
        if extension is None or not captions:
            missing = "no_media" if extension is None else "no_caption"
            return Reject(missing, name, f"has {', '.join(e for e in sample if not e.startswith('__'))}")
        content = bytes(sample[extension])
        info = probe_bytes(content, extension, name, prober)
        if isinstance(info, Reject):
            return info
        bucket = place_clip(info.width, info.height, info.num_frames, info.fps, info.max_gap_s, self._rules)
        if isinstance(bucket, str):
            return Reject(bucket, name, f"{info.width}x{info.height}, {info.num_frames} frames at {info.fps:g} fps")
        return StreamedClip(f"{sample['__url__']}/{sample['__key__']}", captions, bucket, content, info)


def _secure_webdataset() -> _WebDataset:
    """Return parts of webdataset with its safe mode on: no `pipe:` commands and no pickles."""
    # Read once, at its import. Nothing else in this package imports it.
    os.environ["WDS_SECURE"] = "1"
    from webdataset import filters, shardlists, tariterators, utils

    if not utils.enforce_security:  # type: ignore[attr-defined] - missing in its stubs
        raise DataError("webdataset was imported before WDS_SECURE=1 was set; set it in the environment.")
    return _WebDataset(
        shardlists.expand_urls, tariterators.tar_file_expander, tariterators.group_by_keys, filters.shuffle
    )


def _open(tar: str) -> IO[bytes]:
    # Not webdataset's gopen, which would run curl or gsutil in a shell.
    if not is_remote(tar):
        return Path(tar).open("rb")
    folder, _, name = tar.rpartition("/")
    return open_stream(StoredFile(open_store(folder), name))


def _captions(sample: dict[str, Any]) -> tuple[str, ...]:
    try:
        described = json.loads(sample.get(member_named(sample, "json") or "", b"{}"))
    except ValueError:
        described = {}
    for key in CAPTION_KEYS if isinstance(described, dict) else ():
        value = described.get(key)
        captions = tuple([value] if isinstance(value, str) else value or ())
        if captions and all(isinstance(c, str) and c for c in captions):
            return captions
    text = bytes(sample.get(member_named(sample, "txt") or "", b"")).decode("utf-8-sig", "replace").strip()
    return (text,) if text else ()


def draw_streamed(clip: StreamedClip, seed: int, position: int, caption_dropout: float) -> tuple[Any, str]:
    """Return the draws for `ClipStream.frames` (window, crop) and the prompt of a clip at a position."""

    def draw(purpose: str) -> float:
        return uniform(seed, purpose, clip.bucket, position)

    prompt = clip.captions[int(draw("caption") * len(clip.captions))]
    window = draw("frames"), (draw("crop_x"), draw("crop_y"))
    return window, "" if draw("caption_dropout") < caption_dropout else prompt
