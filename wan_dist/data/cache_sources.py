"""What a cache holds: the tensors of every clip of a shard, encoded in batches, in the order of the shard."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_dist.core.errors import DataError
from wan_dist.core.finite import is_finite
from wan_dist.data.clips import ClipDataset, LocatedClip
from wan_dist.data.encode import Encoders
from wan_dist.data.index import ShardSet
from wan_dist.data.reader import locate, read_json
from wan_dist.models.wan.condition import latent_mask

T = TypeVar("T")

_WINDOW_BATCHES = 4
_CENTER = (0.5, 0.5)
_Decoding = tuple[list[LocatedClip], list[Future[NDArray[np.uint8]]]]


@dataclass(frozen=True)
class Encoded:
    """One clip's part of a family.

    Attributes:
        row: row of the clip in its shard's index, -1 where the clip could not even be looked up.
        tensors: bf16 on the CPU, by name; None if there are none.
        problem: why there are none.
    """

    row: int
    tensors: dict[str, Tensor] | None
    problem: str = ""


class Source(Protocol):
    """The content of a family, one shard at a time."""

    def num_clips(self, shard: int) -> int:
        """Return how many clips `samples` yields."""
        ...

    def samples(self, shard: int) -> Iterator[Encoded]:
        """Yield the clips of a shard by ascending row, the same whoever asks."""
        ...

    def empty(self) -> dict[str, Tensor] | None:
        """Return the tensors that belong to no clip."""
        ...


class LatentsSource:
    """Latents of the clips that are in a bucket."""

    def __init__(
        self, dataset: ClipDataset, encoders: Encoders, parts: Sequence[str], *, batch_size: int, num_workers: int
    ) -> None:
        """Prepare.

        Args:
            dataset: opened shards; neither frames nor crop may be left to chance.
            encoders: with the VAE.
            parts: tensors of each clip, see `Encoders.encode_parts`.
            batch_size: clips of one bucket that are encoded at a time.
            num_workers: threads that decode.
        """
        self._dataset, self._encoders, self._parts = dataset, encoders, tuple(parts)
        self._batch_size, self._num_workers = batch_size, num_workers

    def num_clips(self, shard: int) -> int:
        """Return how many clips of the shard are in a bucket."""
        return int(self._dataset.counts[shard].sum())

    def empty(self) -> None:
        """Latents belong to clips only."""

    def samples(self, shard: int) -> Iterator[Encoded]:
        """Yield the latents of a shard; a clip that does not decode gives a problem, as it would in training."""
        clips, problems = self._locate(shard)
        yield from problems
        with ThreadPoolExecutor(self._num_workers, "decode") as pool:
            for window in self._windows_ahead(pool, clips):
                encoded = [sample for batch in window for sample in self._encode(*batch)]
                yield from sorted(encoded, key=lambda sample: sample.row)

    def _locate(self, shard: int) -> tuple[list[LocatedClip], list[Encoded]]:
        """Return the shard's clips by row, and those whose captions cannot be read: training would not use them."""
        clips: list[LocatedClip] = []
        problems: list[Encoded] = []
        for bucket, count in enumerate(self._dataset.counts[shard]):
            for index in range(int(count)):
                try:
                    clips.append(self._dataset.locate(bucket, shard, index, choice=0.0, crop_xy=_CENTER))
                except DataError as error:
                    problems.append(Encoded(-1, None, str(error)))
        return sorted(clips, key=lambda clip: clip.row), problems

    def _windows_ahead(self, pool: ThreadPoolExecutor, clips: Sequence[LocatedClip]) -> Iterator[Iterator[_Decoding]]:
        """Yield, for stretches of the shard, batches of one bucket that are being decoded, and more ahead of them.

        Frames are large (97 MB for 81 of 832x480 px), so only as many clips are ahead as keep the threads busy.
        """
        windows = [self._batches(window) for window in chunks(clips, self._batch_size * _WINDOW_BATCHES)]
        left = iter([batch for window in windows for batch in window])
        ahead = 2 + self._num_workers // self._batch_size
        started: deque[_Decoding] = deque()

        def next_batches(count: int) -> Iterator[_Decoding]:
            for _ in range(count):
                for batch in islice(left, ahead - len(started)):
                    started.append((batch, [pool.submit(self._dataset.frames, clip) for clip in batch]))
                yield started.popleft()

        for window in windows:
            yield next_batches(len(window))

    def _batches(self, window: Sequence[LocatedClip]) -> list[list[LocatedClip]]:
        buckets = dict.fromkeys(clip.bucket for clip in window)
        of_bucket = ([clip for clip in window if clip.bucket == bucket] for bucket in buckets)
        return [batch for clips in of_bucket for batch in chunks(clips, self._batch_size)]

    def _encode(self, batch: Sequence[LocatedClip], futures: Sequence[Future[NDArray[np.uint8]]]) -> Iterator[Encoded]:
        whole: list[tuple[LocatedClip, NDArray[np.uint8]]] = []
        masks: dict[int, Tensor] = {}
        for clip, future in zip(batch, futures, strict=True):
            try:
                frames, mask = future.result(), self._dataset.mask(clip)
                whole.append((clip, frames))
                if mask is not None:
                    reduced = latent_mask(torch.from_numpy(mask), len(frames), self._encoders.stride)
                    masks[clip.row] = reduced.to(torch.bfloat16)
            except DataError as error:
                yield Encoded(clip.row, None, str(error))
        if not whole:
            return
        parts = self._encoders.encode_parts(np.stack([frames for _, frames in whole]), self._parts)
        stored = {name: tensor.to(torch.bfloat16).cpu() for name, tensor in parts.items()}
        for place, (clip, _) in enumerate(whole):
            tensors = {name: tensor[place].contiguous() for name, tensor in stored.items()}
            if clip.row in masks:
                tensors["mask"] = masks[clip.row]
            yield _checked(clip.row, tensors)


class TextSource:
    """Embeddings of every caption of every clip, as `caption_0`, `caption_1`, ..., and of the empty prompt."""

    def __init__(self, shards: ShardSet, encoders: Encoders, *, batch_size: int) -> None:
        """Encode `batch_size` captions at a time."""
        self._shards, self._encoders, self._batch_size = shards, encoders, batch_size

    def num_clips(self, shard: int) -> int:
        """Return how many clips the shard has."""
        return len(self._shards.index(shard))

    def empty(self) -> dict[str, Tensor]:
        """Return the embedding of the empty prompt as `empty`, [L, D]."""
        return {"empty": self._encode([""])[""]}

    def samples(self, shard: int) -> Iterator[Encoded]:
        """Yield the embeddings of a shard, each [L, D] with its true length."""
        for rows in chunks(range(self.num_clips(shard)), self._batch_size * _WINDOW_BATCHES):
            captions = [self._captions(shard, row) for row in rows]
            known = self._encode([text for texts in captions if isinstance(texts, list) for text in texts])
            for row, texts in zip(rows, captions, strict=True):
                if isinstance(texts, list):
                    yield _checked(row, {f"caption_{place}": known[text] for place, text in enumerate(texts)})
                else:
                    yield Encoded(row, None, str(texts))

    def _captions(self, shard: int, row: int) -> list[str] | DataError:
        where = locate(self._shards.tar_path(shard), self._shards.index(shard)[row], "json")
        try:
            return list(read_json(where)["captions"])
        except DataError as error:
            return error

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the trimmed embedding of every different prompt."""
        found: dict[str, Tensor] = {}
        for batch in chunks(list(dict.fromkeys(prompts)), self._batch_size):
            embeds = self._encoders.encode_prompts(batch).to(torch.bfloat16).cpu()
            found |= {prompt: trimmed(embed) for prompt, embed in zip(batch, embeds, strict=True)}
        return found


def trimmed(embed: Tensor) -> Tensor:
    """Return [L, D] of an embedding [512, D] that is zero after its true length L.

    Cut where the zeros begin, so that filling up with zeros gives back exactly what was cut, whatever the tokenizer.
    """
    used = embed.any(dim=1).nonzero()
    return embed[: int(used[-1]) + 1 if len(used) else 0].clone()


def _checked(row: int, tensors: dict[str, Tensor]) -> Encoded:
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        return Encoded(row, None, f"row {row}: the encoder gave NaN or infinity for {', '.join(broken)}")
    return Encoded(row, tensors)


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """Return consecutive lists of at most `size` items."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
