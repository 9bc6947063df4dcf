"""Cached latents and text in place of decoding and encoding, for the samples of one or several data sets."""

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.encode import MAX_TEXT_TOKENS
from wan_dist.data.family_reader import FamilyReader, read_empty, tensor_of


class CachedSamples:
    """What is cached of the clips that training reads. Safe to use from several threads.

    Attributes:
        has_latents: whether latents are cached.
        has_text: whether text embeddings are cached.
    """

    def __init__(
        self, num_shards: Sequence[int], latents: Sequence[FamilyReader] | None, text: Sequence[FamilyReader] | None
    ) -> None:
        """Read the empty prompt, and nothing else yet.

        Args:
            num_shards: shards of each data set, in the order of the readers.
            latents: one family for each data set, None if latents are encoded online.
            text: as `latents`.
        Raises:
            DataError: the empty prompt's embedding cannot be read.
        """
        self._ends = list(itertools.accumulate(num_shards))
        self._latents, self._text = latents, text
        self.has_latents, self.has_text = latents is not None, text is not None
        self._empty = read_empty(text[0].family) if text else None
        self._shapes = [_LatentShape(reader.family.fingerprint["vae"]["config"]) for reader in latents or ()]

    def key_of(self, shard: int, row: int) -> str:
        """Return the key of a clip."""
        place, number = self._place(shard)
        readers = self._latents or self._text
        assert readers is not None, "nothing is cached"
        return readers[place].key_of(number, row)

    def read_latents(self, shard: int, row: int, bucket: Bucket, parts: Sequence[str]) -> dict[str, Tensor]:
        """Return some tensors of a clip's latents, [C, f, h, w] bf16 on the CPU: posterior means, not normalised.

        Args:
            shard: number of the shard.
            row: row of the clip in the shard's index.
            bucket: the shape of its frames.
            parts: names of the tensors.
        Raises:
            DataError: they are not cached, damaged, not finite, or of another shape than the clip's bucket gives.
        """
        assert self._latents is not None, "latents are not cached"
        place, number = self._place(shard)
        tensors = self._latents[place].read(number, row)
        shapes = self._shapes[place]
        found = {part: tensors[part] for part in parts if part in tensors}
        if len(found) == len(parts) and all(t.shape == shapes.of(bucket, part) for part, t in found.items()):
            return found
        key = self._latents[place].key_of(number, row)
        shape_of = {part: list(tensor_of(tensors, part, key).shape) for part in parts}
        part = next(part for part in parts if shape_of[part] != list(shapes.of(bucket, part)))
        raise DataError(
            f"{self._latents[place].family.folder}: sample {key}: {part} has shape {shape_of[part]}, its bucket "
            f"gives {list(shapes.of(bucket, part))}; cache the latents again."
        )

    @property
    def empty_text(self) -> Tensor:
        """Embedding of the empty prompt, [L, D] bf16 on the CPU."""
        assert self._empty is not None, "text is not cached"
        return self._empty

    def read_text(self, shard: int, row: int, choice: float) -> Tensor:
        """Return the embedding of one of a clip's captions, [L, D] bf16 on the CPU.

        Args:
            shard: number of the shard.
            row: row of the clip in the shard's index.
            choice: draw from [0, 1) that picks the caption, as `wan_dist.data.samples.draw_sample` picks it.
        Raises:
            DataError: it is not cached, damaged, not finite or of another shape.
        """
        assert self._text is not None, "text is not cached"
        place, number = self._place(shard)
        tensors = self._text[place].read(number, row)
        width, part = self.empty_text.shape[1], f"caption_{int(choice * len(tensors))}"
        embed = tensors.get(part)
        if embed is None:
            embed = tensor_of(tensors, part, self._text[place].key_of(number, row))
        if embed.ndim != 2 or len(embed) > MAX_TEXT_TOKENS or embed.shape[1] != width:
            raise DataError(
                f"{self._text[place].family.folder}: sample {self.key_of(shard, row)}: an embedding has shape "
                f"{list(embed.shape)}, wanted are up to {MAX_TEXT_TOKENS} tokens of {width}; cache the text again."
            )
        return embed

    def _place(self, shard: int) -> tuple[int, int]:
        """Return the data set of a shard, and the shard's number there."""
        place = bisect_right(self._ends, shard)
        return place, shard - (self._ends[place - 1] if place else 0)


class _LatentShape:
    """The shape of latents by the configuration of the VAE that made them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._channels = int(config["z_dim"])
        self._step_t, self._step = int(config["scale_factor_temporal"]), int(config["scale_factor_spatial"])
        self._known: dict[tuple[Bucket, str], tuple[int, int, int, int]] = {}

    def of(self, bucket: Bucket, part: str) -> tuple[int, int, int, int]:
        shape = self._known.get((bucket, part))
        if shape is None:
            num_frames = (bucket.num_frames - 1) // self._step_t + 1
            channels = 1 if part == "mask" else self._channels
            shape = channels, num_frames, bucket.height // self._step, bucket.width // self._step
            self._known[bucket, part] = shape
        return shape


def padded(embed: Tensor) -> Tensor:
    """Return [512, D] of a trimmed embedding [L, D]: zeros after its true length, as the text encoder gives it."""
    whole = torch.zeros(MAX_TEXT_TOKENS, embed.shape[1], dtype=embed.dtype)
    whole[: len(embed)] = embed
    return whole
