"""Tensors that are read piece by piece: from shards of a checkpoint, from safetensors files, or computed on the way."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from wan_dist.adapters.lora_files import LoraModule
from wan_dist.adapters.lora_math import apply_to_rows
from wan_dist.io.zero_shards import ShardedTensor

CHUNK_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class TensorStream:
    """One tensor that is never whole in memory.

    Attributes:
        shape: of the whole tensor.
        dtype: of the pieces.
        read: returns elements [start, stop) of the flat tensor, 1-D; both are multiples of a row's size.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Number of elements in one index of the first dimension."""
        return math.prod(self.shape[1:])

    def chunks(self) -> Iterator[Tensor]:
        """Yield the flat tensor in pieces of whole rows, about `CHUNK_ELEMENTS` each."""
        step = max(CHUNK_ELEMENTS // max(self.row, 1), 1) * max(self.row, 1)
        for start in range(0, self.count, step):
            yield self.read(start, min(start + step, self.count))


def of_tensor(tensor: Tensor) -> TensorStream:
    """Return a stream of a tensor that is in memory."""
    flat = tensor.detach().reshape(-1)
    return TensorStream(tuple(tensor.shape), tensor.dtype, lambda start, stop: flat[start:stop])


def of_shards(tensor: ShardedTensor) -> TensorStream:
    """Return a stream of a tensor that lies in the ranks' files."""

    def read(start: int, stop: int) -> Tensor:
        parts, offset = [], 0
        for piece in tensor.pieces:
            low, high = max(start - offset, 0), min(stop - offset, piece.numel())
            if low < high:
                parts.append(piece[low:high])
            offset += piece.numel()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return TensorStream(tensor.shape, tensor.dtype, read)


def of_slice(view: Any, dtype: torch.dtype) -> TensorStream:
    """Return a stream of a tensor in an open safetensors file.

    Args:
        view: what `safe_open(...).get_slice(name)` returns.
        dtype: of the file's tensor.
    """
    shape = tuple(view.get_shape())
    row = max(math.prod(shape[1:]), 1)

    def read(start: int, stop: int) -> Tensor:
        if not shape:
            return view[...].reshape(1)
        return view[start // row : stop // row].reshape(-1)

    return TensorStream(shape, dtype, read)


def with_loras(tensor: TensorStream, loras: Iterable[tuple[LoraModule, float]]) -> TensorStream:
    """Return a stream of a weight with LoRAs applied one after another, computed in fp32 row by row.

    Args:
        tensor: the weight.
        loras: each with its multiplier.
    """
    applied = list(loras)

    def read(start: int, stop: int) -> Tensor:
        rows = tensor.read(start, stop).float().reshape(-1, *tensor.shape[1:])
        for module, multiplier in applied:
            rows = apply_to_rows(rows, start // tensor.row, module, multiplier)
        return rows.reshape(-1)

    return replace(tensor, read=read)
