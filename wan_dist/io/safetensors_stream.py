"""Writing safetensors in pieces, so that memory stays at one chunk whatever the size of the model.

The safetensors library writes tensors that are whole in memory. The format is a length, a JSON header and raw bytes
(https://github.com/huggingface/safetensors#format); what is written here is read back by the library and compared.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from wan_dist.core.errors import CheckpointError
from wan_dist.io.hashing import sync, write_json_atomic
from wan_dist.io.zero_shards import ShardedTensor

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_CHUNK_ELEMENTS = 4 << 20


def write_sharded(
    folder: Path,
    base_name: str,
    tensors: Mapping[str, ShardedTensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> list[Path]:
    """Write tensors as one safetensors file, or several with an index, in diffusers' naming; read back and compare.

    Args:
        folder: existing folder.
        base_name: file name without suffix, such as `diffusion_pytorch_model`.
        tensors: what to write, by name.
        dtype: dtype of every tensor in the files.
        max_shard_bytes: size at which a new file begins; a larger tensor gets a file of its own.
        metadata: strings for the header's `__metadata__`.
        on_bytes: called with the number of bytes written or compared since the last call.

    Returns:
        The safetensors files.

    Raises:
        CheckpointError: a value is not finite, or what was read back differs.
    """
    shards = _assign(tensors, dtype.itemsize, max_shard_bytes)
    names = [
        f"{base_name}.safetensors" if len(shards) == 1 else f"{base_name}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for name, keys in zip(names, shards, strict=True):
        part = {key: tensors[key] for key in keys}
        _write_file(folder / name, part, dtype, metadata, on_bytes)
        _compare_file(folder / name, part, dtype, on_bytes)
    if len(shards) > 1:
        total = sum(_count(t) for t in tensors.values()) * dtype.itemsize
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json_atomic(folder / f"{base_name}.safetensors.index.json", index)
    return [folder / name for name in names]


def _count(tensor: ShardedTensor) -> int:
    return torch.Size(tensor.shape).numel()


def _assign(tensors: Mapping[str, ShardedTensor], itemsize: int, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        num_bytes = _count(tensor) * itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _chunks(tensor: ShardedTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in tensor.pieces:
        for start in range(0, piece.numel(), _CHUNK_ELEMENTS):
            yield piece[start : start + _CHUNK_ELEMENTS].detach().to(dtype).contiguous()


def _write_file(
    path: Path,
    tensors: Mapping[str, ShardedTensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + _count(tensor) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as handle:
        handle.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, tensor in tensors.items():
            for chunk in _chunks(tensor, dtype):
                if not torch.isfinite(chunk).all():
                    raise CheckpointError(f"{name}: holds values that are not finite in {dtype}; nothing was exported.")
                on_bytes(handle.write(chunk.view(torch.uint8).numpy().data))
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    sync(path.parent)


def _compare_file(
    path: Path, tensors: Mapping[str, ShardedTensor], dtype: torch.dtype, on_bytes: Callable[[int], None]
) -> None:
    with safe_open(path, framework="pt") as handle:
        if set(handle.keys()) != set(tensors):
            raise CheckpointError(f"{path}: holds other tensors than were written.")
        for name, tensor in tensors.items():
            read = handle.get_tensor(name).reshape(-1)
            offset = 0
            for chunk in _chunks(tensor, dtype):
                found = read[offset : offset + chunk.numel()]
                if found.dtype != dtype or not torch.equal(found, chunk):
                    raise CheckpointError(f"{path}: {name} reads back differently from what was written.")
                offset += chunk.numel()
                on_bytes(chunk.numel() * dtype.itemsize)
