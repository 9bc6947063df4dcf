"""Show how far packing is: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from wan_dist.data.pack import PackProgress

LINE_INTERVAL_S: Final = 10.0


@contextmanager
def show_progress() -> Iterator[Callable[[PackProgress], None]]:
    """Yield a callback for `pack_clips` that writes to stderr."""
    if not sys.stderr.isatty():
        yield _line_printer()
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("clips  {task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        rate = _Rate()

        def update(state: PackProgress) -> None:
            description = f"{rate.describe(state)}{_rejects(state)}  ETA"
            bar.update(task, total=state.num_clips, completed=state.done_clips, description=description)

        yield update


class _Rate:
    """Clips and bytes per second since the first report, which may follow an earlier run's work."""

    def __init__(self) -> None:
        self._start: tuple[float, int, int] | None = None

    def describe(self, state: PackProgress) -> str:
        clips, num_bytes = self._per_second(state)
        return f"{clips:.1f} clips/s  {num_bytes / 1e6:.1f} MB/s"

    def eta_s(self, state: PackProgress) -> float | None:
        """Seconds left, None while unknown."""
        _, num_bytes = self._per_second(state)
        return (state.num_bytes - state.done_bytes) / num_bytes if num_bytes else None

    def _per_second(self, state: PackProgress) -> tuple[float, float]:
        now = time.monotonic()
        if self._start is None:
            self._start = now, state.done_clips, state.done_bytes
        since, clips, num_bytes = self._start
        elapsed = max(now - since, 1e-9)
        return (state.done_clips - clips) / elapsed, (state.done_bytes - num_bytes) / elapsed


def _line_printer() -> Callable[[PackProgress], None]:
    rate = _Rate()
    next_line = time.monotonic() + LINE_INTERVAL_S

    def update(state: PackProgress) -> None:
        nonlocal next_line
        text, eta_s = rate.describe(state), rate.eta_s(state)
        finished = state.done_clips == state.num_clips
        if time.monotonic() < next_line and not finished:
            return
        next_line = time.monotonic() + LINE_INTERVAL_S
        eta = f"  ETA {eta_s:.0f} s" if eta_s is not None and not finished else ""
        print(f"{state.done_clips}/{state.num_clips} clips  {text}{eta}{_rejects(state)}", file=sys.stderr, flush=True)

    return update


def _rejects(state: PackProgress) -> str:
    reasons = ", ".join(f"{count} {code}" for code, count in sorted(state.rejects.items()))
    return f"  rejected: {reasons}" if reasons else ""


@contextmanager
def show_count(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows how many of how many are done, on stderr."""
    if not sys.stderr.isatty():
        next_line = time.monotonic() + LINE_INTERVAL_S

        def say(done: int, total: int) -> None:
            nonlocal next_line
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + LINE_INTERVAL_S
                print(f"{done}/{total} {unit}", file=sys.stderr, flush=True)

        yield say
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
