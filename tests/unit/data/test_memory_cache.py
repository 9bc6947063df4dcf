from concurrent.futures import ThreadPoolExecutor

import torch

from wan_dist.data.memory_cache import MemoryCache


def tensor(value: float) -> torch.Tensor:
    return torch.full((10,), float(value))  # 40 bytes


def test_what_was_used_longest_ago_is_dropped_first() -> None:
    cache = MemoryCache(100)
    cache.put("a", tensor(1))
    cache.put("b", tensor(2))
    assert cache.get("a") is not None
    cache.put("c", tensor(3))
    assert cache.get("b") is None
    a, c = cache.get("a"), cache.get("c")
    assert a is not None
    assert c is not None
    assert (a[0].item(), c[0].item()) == (1, 3)


def test_bytes_and_not_elements_count() -> None:
    cache = MemoryCache(40)
    cache.put("bf16", tensor(1).bfloat16())
    cache.put("another", tensor(2).bfloat16())
    assert cache.get("bf16") is not None
    cache.put("fp32", tensor(3))
    assert cache.get("bf16") is None
    assert cache.get("another") is None
    assert cache.get("fp32") is not None


def test_what_never_fits_drops_nothing() -> None:
    cache = MemoryCache(40)
    cache.put("a", tensor(1))
    cache.put("large", torch.zeros(11))
    assert cache.get("large") is None
    assert cache.get("a") is not None
    nothing = MemoryCache(0)
    nothing.put("a", tensor(1))
    assert nothing.get("a") is None


def test_the_first_value_of_a_key_stays_and_is_counted_once() -> None:
    cache = MemoryCache(80)
    for _ in range(5):
        cache.put("a", tensor(1))
    cache.put("b", tensor(2))
    assert cache.get("a") is not None
    assert cache.get("b") is not None


def test_threads_never_see_another_keys_tensor() -> None:
    cache = MemoryCache(400)

    def use(start: int) -> None:
        for i in range(500):
            number = (start * 7 + i) % 30
            cache.put(str(number), tensor(number))
            found = cache.get(str(number))
            assert found is None or found[0].item() == number

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(use, start) for start in range(4)]:
            future.result()
