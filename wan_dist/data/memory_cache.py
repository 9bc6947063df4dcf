"""Encoded latents and text kept in host memory, the least recently used dropped first."""

import threading
from collections import OrderedDict

from torch import Tensor


class MemoryCache:
    """Tensors by key, at most `max_bytes` of them; reader threads may look while the trainer adds."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty; 0 bytes keeps nothing."""
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Tensor | None:
        """Return the tensor of `key` if it is still here."""
        with self._lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: str, value: Tensor) -> None:
        """Keep a CPU tensor; drop others until it fits, or do nothing if it never will."""
        size = value.numel() * value.element_size()
        with self._lock:
            if size > self._max_bytes or key in self._entries:
                return
            self._entries[key] = value
            self._num_bytes += size
            while self._num_bytes > self._max_bytes:
                _, old = self._entries.popitem(last=False)
                self._num_bytes -= old.numel() * old.element_size()
