"""Tensors that are read piece by piece: from shards of a checkpoint, from safetensors files, or computed on the way."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import IO

import torch
from torch import Tensor

from wan_dist.adapters.lora_files import LoraModule
from wan_dist.adapters.lora_math import apply_to_rows
from wan_dist.core.errors import ModelError
from wan_dist.io.zero_shards import ShardedTensor

# 2 MB of fp32: small enough that hashing, checking and writing a piece find it in the processor's cache.
CHUNK_ELEMENTS = 512 << 10


@dataclass(frozen=True)
class TensorStream:
    """One tensor that is never whole in memory.

    Attributes:
        shape: of the whole tensor.
        dtype: of the pieces.
        read: returns elements [start, stop) of the flat tensor, 1-D; both are multiples of a row's size.
        pieces: 1-D tensors that follow on each other to the flat tensor, where it lies so; they are yielded uncopied.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    pieces: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Number of elements in one index of the first dimension."""
        return math.prod(self.shape[1:])

    def chunks(self) -> Iterator[Tensor]:
        """Yield the flat tensor in parts of about `CHUNK_ELEMENTS`."""
        for piece in self.pieces:
            yield from piece.split(CHUNK_ELEMENTS)
        if self.pieces:
            return
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

    return TensorStream(tensor.shape, tensor.dtype, read, tuple(p for p in tensor.pieces if p.numel()))


def of_file(file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> TensorStream:
    """Return a stream of a tensor whose bytes lie in a file.

    Read and not mapped: a mapping of torch's counts as private memory of the process, the whole file of it.

    Args:
        file: open for reading; it stays open with the stream.
        offset: of the tensor's first byte.
        shape: of the tensor.
        dtype: of its elements.
    """

    def read(start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, dtype=dtype)
        buffer = values.view(torch.uint8).numpy().data
        file.seek(offset + start * dtype.itemsize)
        filled = 0
        while filled < len(buffer):
            count = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
            if not count:
                raise ModelError(f"{file.name}: became shorter while it was read.")
            filled += count
        return values

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

    return replace(tensor, read=read, pieces=())
