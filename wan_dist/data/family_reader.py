"""Read cached latents and text embeddings: one pread per sample into a buffer that becomes the tensors.

Measured on two shared CPU cores for 4.2 MB of latents: pread 0.30 ms, CRC-32 0.15 ms (the standard library's: 1.0 ms),
the search for NaN and infinity 0.30 ms (`torch.isfinite`: 9.8 ms).
"""

import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from wan_dist.core.errors import DataError, NotFiniteError
from wan_dist.data.family import EMPTY_NAME, Family

_MAX_OPEN_SHARDS: Final = 128
_LENGTH_BYTES: Final = 8
_ADVICE: Final = "run `wan-data cache` again, which checks every shard and writes damaged ones anew"


class FamilyReader:
    """Reads samples of a family by shard and row. Safe to use from several threads.

    Attributes:
        family: the opened family.
    """

    def __init__(self, family: Family) -> None:
        """Open nothing yet."""
        self.family = family
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, row: int) -> dict[str, Tensor]:
        """Return the tensors of a sample, bf16 on the CPU.

        Raises:
            DataError: the clip was not cached, or its member is damaged.
        NotFiniteError: it holds NaN or infinity.
        """
        opened = self._shard(shard)
        place = opened.rows[row]
        name = f"{opened.path}: sample {place['key'].decode()}"
        size = int(place["size"])
        if not size:
            raise DataError(f"{name}: was not cached; journal/{shard:06d}.json beside the shard says why.")
        buffer = np.empty(size, np.uint8)
        try:
            num_read = _pread_into(opened.fd, buffer.data, int(place["offset"]))
        except OSError as error:
            raise DataError(f"{name}: {error.strerror}; check the disk and the path.") from error
        if num_read != size or crc32(buffer) != int(place["crc32"]):
            raise DataError(f"{name}: damaged (checksum differs); {_ADVICE}.")
        tensors = parse_tensors(buffer, name, search=not opened.searched[row])
        opened.searched[row] = True  # the same checksum again means the same numbers
        return tensors

    def key_of(self, shard: int, row: int) -> str:
        """Return the key of a clip."""
        return self._shard(shard).rows[row]["key"].decode()

    def _shard(self, number: int) -> "_OpenShard":
        with self._lock:
            opened = self._open.get(number)
            if opened is None:
                opened = self._open[number] = _OpenShard(self.family, number)
                if len(self._open) > _MAX_OPEN_SHARDS:
                    # Closed with its last reader: another thread may be in the middle of a pread.
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return opened


class _OpenShard:
    """A shard's file and index, closed when nobody holds it any more."""

    def __init__(self, family: Family, number: int) -> None:
        self.path = family.tar_path(number)
        self.rows = family.index(number)
        self.searched = np.zeros(len(self.rows), bool)  # which were found to hold neither NaN nor infinity
        try:
            self.fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}; check the disk and the path.") from error
        weakref.finalize(self, os.close, self.fd)


def read_empty(family: Family) -> Tensor:
    """Return the embedding of the empty prompt in a text family, [L, D] bf16.

    Raises:
        DataError: it is missing or damaged.
    """
    path = family.folder / EMPTY_NAME
    try:
        content = np.frombuffer(bytearray(path.read_bytes()), np.uint8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; {_ADVICE}.") from error
    return tensor_of(parse_tensors(content, str(path)), "empty", str(path))


def tensor_of(tensors: Mapping[str, Tensor], part: str, name: str) -> Tensor:
    """Return a sample's tensor; raise DataError naming the sample if it has none of that name."""
    if part not in tensors:
        raise DataError(f"{name}: holds {', '.join(tensors) or 'nothing'} and no {part}; {_ADVICE}.")
    return tensors[part]


def parse_tensors(buffer: NDArray[np.uint8], name: str, *, search: bool = True) -> dict[str, Tensor]:
    """Return the bf16 tensors of a safetensors file as views of its bytes.

    `safetensors.torch.load` copies every tensor: 107 us for 5.8 MB against 8.

    Args:
        buffer: the whole file; it must stay unchanged while the tensors live.
        name: how an error names it.
        search: look for NaN and infinity.
    Raises:
        DataError: it is no safetensors file or holds another dtype.
        NotFiniteError: it holds NaN or infinity.
    Source: https://github.com/huggingface/safetensors#format.
    """
    try:
        start = _LENGTH_BYTES + int.from_bytes(buffer[:_LENGTH_BYTES].tobytes(), "little")
        header: dict[str, Any] = json.loads(buffer[_LENGTH_BYTES:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {part: _view(buffer[start:], entry) for part, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"{name}: not bf16 safetensors ({error}); {_ADVICE}.") from None
    for part, tensor in tensors.items():
        if search and not is_finite(tensor):
            raise NotFiniteError(f"{name}: {part} holds NaN or infinity; {_ADVICE}.")
    return tensors


def _view(data: NDArray[np.uint8], entry: Mapping[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    if entry["dtype"] != "BF16" or not 0 <= first <= last <= len(data):
        raise ValueError(f"dtype {entry['dtype']}, bytes {first} to {last} of {len(data)}")
    return torch.from_numpy(data[first:last]).view(torch.bfloat16).view(entry["shape"])


def is_finite(tensor: Tensor) -> bool:
    """Return whether a contiguous bf16 CPU tensor holds neither NaN nor infinity.

    Their exponent is all ones: as int16 the positive ones are the largest numbers, as uint16 the negative ones are.
    Two maxima are the fastest exact test there is in NumPy, 30 times as fast as `torch.isfinite`.
    """
    if not tensor.numel():
        return True
    bits = tensor.view(torch.int16).numpy()
    return bool(bits.max() < 0x7F80 and bits.view(np.uint16).max() < 0xFF80)


def _pread_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view`, at most 2 GiB at a time on Linux; return the bytes read."""
    done = 0
    while done < len(view) and (count := os.preadv(fd, [view[done:]], offset + done)):
        done += count
    return done
