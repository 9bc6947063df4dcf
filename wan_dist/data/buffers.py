"""Large buffers that are used again once nobody looks at them any more.

The allocator gives memory of this size back to the system and gets it again page by page: with two reader threads that
took as long as reading itself.
"""

import weakref
from collections import defaultdict, deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

_UNIT_BYTES: Final = 1 << 20
"""Smaller buffers come from the allocator, which keeps those; larger ones are rounded up to multiples."""

_MAX_FREE_BYTES: Final = 1 << 28


class BufferPool:
    """Memory for arrays. Safe to use from several threads."""

    def __init__(self) -> None:
        """Start empty."""
        # Neither list nor count has a lock: a buffer comes back when its last view dies, which can be anywhere, in the
        # middle of `take` too. deque's methods are atomic; the count may be off by a buffer or two.
        self._free: defaultdict[int, deque[bytearray]] = defaultdict(deque)
        self._free_bytes = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return an array [size] of any content. Its memory is used again once it and all views of it are gone."""
        if size < _UNIT_BYTES:
            return np.empty(size, np.uint8)
        capacity = -(-size // _UNIT_BYTES) * _UNIT_BYTES
        try:
            memory = self._free[capacity].pop()
            self._free_bytes -= capacity
        except IndexError:
            memory = bytearray(capacity)
        array = np.frombuffer(memory, np.uint8, size)  # views of it, in tensors too, keep this very array alive
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _give_back(self, memory: bytearray) -> None:
        if self._free_bytes + len(memory) <= _MAX_FREE_BYTES:
            self._free_bytes += len(memory)
            self._free[len(memory)].append(memory)
