"""Writing safetensors in pieces, so that memory stays at one chunk whatever the size of the model.

The safetensors library writes tensors that are whole in memory. The format is a length, a JSON header and raw bytes
(https://github.com/huggingface/safetensors#format). What is written here is synced, read back and
compared by CRC-32, and its header is read by the library. Where memory allows the kernel answers that reading from its
cache: it finds our mistakes and failed writes, not a disk that forgets.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from zlib_ng import zlib_ng

from wan_dist.core.errors import CheckpointError
from wan_dist.core.finite import is_finite
from wan_dist.io.hashing import sync, write_json_atomic
from wan_dist.io.tensor_stream import TensorStream

HASH_KEY = "modelspec.hash_sha256"
"""Header string that a file gets the SHA-256 of its own tensor bytes in, if the given metadata has it."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_EMPTY_HASH = f"0x{'0' * 64}"
_READ_BYTES = 8 << 20


def write_sharded(
    folder: Path,
    base_name: str,
    tensors: Mapping[str, TensorStream],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> list[Path]:
    """Write tensors as one safetensors file, or several with an index, in diffusers' naming; read back and compare.

    Args:
        folder: existing folder.
        base_name: file name without suffix, such as `diffusion_pytorch_model`.
        tensors: what to write, by name.
        dtype: dtype of every tensor in the files; None keeps each one's.
        max_shard_bytes: size at which a new file begins; a larger tensor gets a file of its own.
        metadata: strings for each header's `__metadata__`.
        on_bytes: called with the number of bytes written or compared since the last call.

    Returns:
        The safetensors files.

    Raises:
        CheckpointError: a value is not finite, the disk is full, or what was read back differs.
    """
    shards = _assign(tensors, dtype, max_shard_bytes)
    names = [
        f"{base_name}.safetensors" if len(shards) == 1 else f"{base_name}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        for i in range(len(shards))
    ]
    for name, keys in zip(names, shards, strict=True):
        part = {key: tensors[key] for key in keys}
        write_file(folder / name, part, dtype=dtype, metadata=metadata, on_bytes=on_bytes)
    if len(shards) > 1:
        total = num_bytes(tensors, dtype)
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json_atomic(folder / f"{base_name}.safetensors.index.json", index)
    return [folder / name for name in names]


def write_file(
    path: Path,
    tensors: Mapping[str, TensorStream],
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    """Write one safetensors file under a temporary name, read it back, compare and rename it.

    Args, Raises: as `write_sharded`.
    """
    # Larger elements first, as the library does: every tensor then begins at a multiple of its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -(dtype or item[1].dtype).itemsize))
    header = _Header(ordered, dtype, metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(header.encoded(_EMPTY_HASH))
            crc, digest = _write_tensors(handle.write, ordered, dtype, HASH_KEY in metadata, on_bytes)
            handle.seek(0)
            handle.write(header.encoded(digest))
            handle.flush()
            os.fsync(handle.fileno())
        _compare(temporary, header, crc, digest, on_bytes)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is not None:
            raise
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}).") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def num_bytes(tensors: Mapping[str, TensorStream], dtype: torch.dtype | None) -> int:
    """Return the size of tensors in a file, bytes."""
    return sum(tensor.count * (dtype or tensor.dtype).itemsize for tensor in tensors.values())


def _assign(tensors: Mapping[str, TensorStream], dtype: torch.dtype | None, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        wanted = tensor.count * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + wanted > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += wanted
    return shards


class _Header:
    """The header of a file, of the same length whatever the digest that it names."""

    def __init__(
        self, tensors: Mapping[str, TensorStream], dtype: torch.dtype | None, metadata: Mapping[str, str]
    ) -> None:
        self.metadata = dict(metadata)
        self.tensors: dict[str, dict[str, object]] = {}
        offset = 0
        for name, tensor in tensors.items():
            kept = dtype or tensor.dtype
            end = offset + tensor.count * kept.itemsize
            entry = {"dtype": _DTYPE_NAMES[kept], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            self.tensors[name] = entry
            offset = end

    def metadata_with(self, digest: str) -> dict[str, str]:
        return {name: digest if name == HASH_KEY else value for name, value in self.metadata.items()}

    def encoded(self, digest: str) -> bytes:
        header = {"__metadata__": self.metadata_with(digest), **self.tensors}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded


def _write_tensors(
    write: Callable[[memoryview], int],
    tensors: Mapping[str, TensorStream],
    dtype: torch.dtype | None,
    hashed: bool,
    on_bytes: Callable[[int], None],
) -> tuple[int, str]:
    """Write the tensors' bytes; return their CRC-32 and, where wanted, their SHA-256 as `0x...`."""
    crc, digest = 0, hashlib.sha256()
    for name, tensor in tensors.items():
        for piece in tensor.chunks():
            chunk = piece.detach().to(dtype or tensor.dtype).contiguous()
            if not is_finite(chunk):
                raise CheckpointError(
                    f"{name}: holds values that are not finite in {chunk.dtype}; nothing was written."
                )
            data = chunk.view(torch.uint8).numpy().data
            crc = zlib_ng.crc32(data, crc)
            if hashed:
                digest.update(data)
            on_bytes(write(data))
    return crc, f"0x{digest.hexdigest()}"


def _compare(path: Path, header: _Header, crc: int, digest: str, on_bytes: Callable[[int], None]) -> None:
    try:
        with safe_open(path, framework="np") as handle:  # torch's mapping would count as private memory
            same = handle.metadata() == header.metadata_with(digest) and set(handle.keys()) == set(header.tensors)
            for name, entry in header.tensors.items():
                view = handle.get_slice(name)
                same = same and view.get_shape() == entry["shape"] and view.get_dtype() == entry["dtype"]
    except SafetensorError as error:
        raise CheckpointError(f"{path}: reads back differently from what was written ({error}).") from None
    found = 0
    with path.open("rb", buffering=0) as handle:
        handle.seek(len(header.encoded(digest)))
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := handle.readinto(buffer):
            found = zlib_ng.crc32(buffer[:count], found)
            on_bytes(count)
    if not same or found != crc:
        raise CheckpointError(f"{path}: reads back differently from what was written; is the disk sound?")
