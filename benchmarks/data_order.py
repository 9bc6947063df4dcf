"""Start, resume and memory of the sample order at 1e8 samples, against a stored permutation."""

import os
import resource
import time
from collections.abc import Callable
from itertools import islice

import numpy as np
from measure import hardware, versions

from wan_dist.core.order import SampleOrder

NUM_BUCKETS = 16
BLOCK_SIZE = 64
NUM_READ = 20_000


def run(quick: bool) -> None:
    """Measure and print a table."""
    num_shards = 10_000 if quick else 100_000
    counts = np.random.default_rng(0).multinomial(1000, np.full(NUM_BUCKETS, 1 / NUM_BUCKETS), size=num_shards)
    print(f"{hardware()}; {versions('numpy')}")
    print(f"{counts.sum():.0e} samples, {num_shards} shards, {NUM_BUCKETS} buckets, blocks of {BLOCK_SIZE}")
    print("| what | CPU s | extra memory MiB |")
    print("|---|---|---|")
    epoch_blocks = int(counts.sum()) // BLOCK_SIZE
    cases: dict[str, Callable[[], object]] = {
        "start, first block": lambda: _first(counts, 0, 0),
        "resume at 75 % of epoch 3": lambda: _first(counts, 3, epoch_blocks * 3 // 4),
        f"start and {NUM_READ} samples": lambda: _read(counts),
        "full permutation, stored": lambda: np.random.default_rng(0).permutation(int(counts.sum())),
    }
    for name, work in cases.items():
        cpu_s, memory_mib = _cost(work)
        print(f"| {name} | {cpu_s:.2f} | {memory_mib:.0f} |", flush=True)


def _first(counts: np.ndarray, epoch: int, block: int) -> None:
    order = SampleOrder(counts, BLOCK_SIZE, 64, seed=0)
    found = next(order.blocks(epoch, block))
    order.at(found.bucket, found.first)


def _read(counts: np.ndarray) -> None:
    order = SampleOrder(counts, BLOCK_SIZE, 64, seed=0)
    for block in islice(order.blocks(), NUM_READ // BLOCK_SIZE):
        for position in range(BLOCK_SIZE):
            order.at(block.bucket, block.first + position)


def _cost(work: Callable[[], object]) -> tuple[float, float]:
    """Return CPU-seconds and the growth of peak memory in MiB of `work` in a forked process."""
    read_end, write_end = os.pipe()
    if not (child := os.fork()):
        before_kib = _peak_kib()
        start_s = time.process_time()
        work()
        answer = f"{time.process_time() - start_s} {(_peak_kib() - before_kib) / 1024}"
        os.write(write_end, answer.encode())
        os._exit(0)
    os.waitpid(child, 0)
    cpu_s, memory_mib = os.read(read_end, 100).split()
    os.close(read_end)
    os.close(write_end)
    return float(cpu_s), float(memory_mib)


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
