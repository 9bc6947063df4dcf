"""Large buffers are used again, and never while somebody looks at them."""

import gc

import numpy as np
import torch

from wan_dist.data.buffers import BufferPool


def test_memory_comes_back_with_its_last_view_only() -> None:
    pool = BufferPool()
    first = pool.take(3_000_001)
    assert first.shape == (3_000_001,)
    address = first.ctypes.data
    tensor = torch.from_numpy(first[16:48].view(np.int16).reshape(4, 4)).view(torch.bfloat16)
    part = tensor[1:]
    del first, tensor
    gc.collect()
    other = pool.take(3_000_000)
    assert other.ctypes.data != address
    del part
    gc.collect()
    assert pool.take(2_900_000).ctypes.data == address


def test_content_of_a_living_buffer_stays() -> None:
    pool = BufferPool()
    kept = []
    for number in range(50):
        array = pool.take(1 << 20)
        array[:] = number
        if number % 5 == 0:
            kept.append((number, torch.from_numpy(array[100:200])))
        del array
    assert all((tensor == number).all() for number, tensor in kept)
    assert len({pool.take(1 << 20).ctypes.data for _ in range(3)}) == 1
