"""Files as torch and safetensors would write them, laid out before a byte of tensor data is copied.

A save must hold up training for one copy of the state and no longer. So a file's image is computed first: the small
parts as bytes, and for each tensor's storage the offset at which its bytes belong. Storages are then copied straight
to their place in shared memory, from which another process writes the file as it is.
"""

import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.serialization import skip_data

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}


class UnknownLayoutError(Exception):
    """torch wrote something else than what this module knows; the caller writes the file the slow way."""


@dataclass(frozen=True)
class FileImage:
    """A file's content, its tensors still where they are.

    Attributes:
        size: bytes of the file.
        parts: (offset, content); what no part covers is zero.
    """

    size: int
    parts: tuple[tuple[int, bytes | torch.UntypedStorage], ...]

    def copy_to(self, target: Tensor) -> None:
        """Copy everything into `target`, [size] uint8 in host memory; returns when all of it is there."""
        devices: set[torch.device] = set()
        for offset, content in self.parts:
            if isinstance(content, bytes):
                source = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            else:
                source = torch.empty(0, dtype=torch.uint8, device=content.device).set_(content)
            target.narrow(0, offset, source.numel()).copy_(source, non_blocking=True)
            if source.device.type != "cpu":
                devices.add(source.device)
        for device in devices:
            torch.accelerator.synchronize(device)


class _Sink:
    """A file that keeps small writes and notes where torch leaves room for storages."""

    def __init__(self) -> None:
        self.position = 0
        self.written: list[tuple[int, bytes]] = []
        self.holes: list[tuple[int, int]] = []

    def write(self, data: Any) -> int:
        content = bytes(data)
        self.written.append((self.position, content))
        self.position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 1 or offset < 0:
            raise UnknownLayoutError(f"torch.save moved by {offset} from {whence}")
        self.holes.append((self.position, offset))
        self.position += offset
        return self.position

    def tell(self) -> int:
        return self.position

    def flush(self) -> None:
        pass


def torch_image(value: Any) -> FileImage:
    """Return what `torch.save(value, path)` would write, but for the CRCs of tensors, which torch does not read.

    `skip_data` makes torch leave room for each storage, in the order in which pickling comes upon them
    (https://docs.pytorch.org/docs/stable/generated/torch.serialization.skip_data.html).

    Raises:
        UnknownLayoutError: this version of torch lays files out in another way.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    class Pickler(pickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, Tensor):
                storage = obj.untyped_storage()
                storages.setdefault(storage._cdata, storage)
            return NotImplemented

    sink = _Sink()
    with skip_data():
        torch.save(value, sink, pickle_module=SimpleNamespace(Pickler=Pickler, __name__="pickle"))  # type: ignore[arg-type]
    filled = [storage for storage in storages.values() if storage.nbytes()]  # torch does not move for empty ones
    if [storage.nbytes() for storage in filled] != [size for _, size in sink.holes]:
        raise UnknownLayoutError("torch.save left other room than the tensors need")
    tensors = [(offset, storage) for (offset, _), storage in zip(sink.holes, filled, strict=True)]
    return FileImage(sink.position, (*sink.written, *tensors))


def safetensors_image(tensors: Mapping[str, Tensor]) -> FileImage:
    """Return a safetensors file of contiguous tensors.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = struct.pack("<Q", len(encoded)) + encoded
    parts: list[tuple[int, bytes | torch.UntypedStorage]] = [(0, start)]
    position = len(start)
    for tensor in tensors.values():
        size = tensor.numel() * tensor.element_size()
        storage = tensor.detach().contiguous().untyped_storage()
        if storage.nbytes() != size:
            storage = tensor.detach().clone().untyped_storage()
        if size:
            parts.append((position, storage))
        position += size
    return FileImage(position, tuple(parts))
