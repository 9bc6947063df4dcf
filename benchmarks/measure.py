"""Measure contestants against each other in one run: interleaved, in processes of their own, medians.

It imports nothing heavy: benchmarks set thread counts before those libraries are there.
"""

import argparse
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Spent:
    """CPU-seconds (user and system, of a process and all it started) and wall seconds."""

    cpu_s: float
    wall_s: float


def run_apart(work: Callable[[], object]) -> Spent:
    """Run `work` in a forked process and return what that cost."""
    start_s = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit("a contestant failed; its message is above")
    return Spent(usage.ru_utime + usage.ru_stime, time.monotonic() - start_s)


def interleave(
    contestants: Mapping[str, Callable[[], object]], rounds: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, list[Spent]]:
    """Run all contestants in turn, `rounds` times, after one round that does not count.

    `prepare` runs before each, unmeasured: cleaning up after one contestant must not be counted for the next.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, work in contestants.items():
            prepare()
            cost = run_apart(work)
            if number:
                spent[name].append(cost)
    return spent


def settle(num_bytes: int = 3 << 30) -> None:
    """Finish pending writes, and touch and free memory: for `interleave`'s `prepare`.

    A page of memory that a virtual machine uses for the first time, or again after its host took it back, costs ten
    times one that it has. Which contestant meets those would be chance.
    """
    os.sync()
    with mmap.mmap(-1, num_bytes) as memory:
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            memory[offset] = 1


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios within each round, so that a slow minute of the machine hits both sides."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def hardware() -> str:
    """Name processor, usable cores, kernel and interpreter."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{names[0] if names else platform.machine()}, {cores} cores, {system}"


def versions(*packages: str) -> str:
    """Name packages with their versions."""
    return ", ".join(f"{package} {version(package)}" for package in packages)


def run_parts(description: str, parts: Mapping[str, str]) -> None:
    """Run one part of a benchmark, or all of them, as the command line says.

    Args:
        description: what `--help` says.
        parts: module of each part; it has `run(quick)`, which prints a table.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("part", choices=[*parts, "all"])
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds: to see that it runs")
    arguments = parser.parse_args()
    # Before numpy and torch are imported: their thread pools would count as CPU time of whoever comes first.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for part in parts if arguments.part == "all" else [arguments.part]:
        print(f"\n## {part}", flush=True)
        import_module(parts[part]).run(arguments.quick)
