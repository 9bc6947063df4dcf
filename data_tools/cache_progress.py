"""How far caching is, over all ranks: a bar on a terminal, now and then a line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from wan_dist.cli.progress import progress_bar

LINE_INTERVAL_S: Final = 10.0
_SHARE_INTERVAL_S: Final = 1.0
_PREFIX: Final = ".progress-"


class Tally:
    """Clips done by all ranks. Each rank leaves its count in a file, since ranks send no messages."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Start at 0; `folder` is shared by all ranks."""
        self._path = folder / f"{_PREFIX}{rank}"
        self._own = 0
        self._others = 0
        self._next_share = 0.0

    def add(self, num_clips: int) -> int:
        """Count clips and return how many all ranks have done, as far as known."""
        self._own += num_clips
        now = time.monotonic()
        if now >= self._next_share:
            self._next_share = now + _SHARE_INTERVAL_S
            self._share()
        return self._own + self._others

    def _share(self) -> None:
        self._path.write_text(str(self._own))
        self._others = 0
        for path in self._path.parent.glob(f"{_PREFIX}*"):
            # Another rank may be in the middle of writing its count.
            with contextlib.suppress(OSError, ValueError):
                self._others += int(path.read_text()) if path != self._path else 0


def clear_tallies(folder: Path) -> None:
    """Delete the counts of ranks that are gone."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)


@contextmanager
def show_clips(label: str, total: int, tally: Tally, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yield a callback that counts clips and, on the rank where `shown`, shows them with the time left on stderr."""
    if not shown:

        def count_only(num_clips: int) -> None:
            tally.add(num_clips)

        yield count_only
        return
    console = Console(stderr=True)
    started = time.monotonic()
    next_line = started + LINE_INTERVAL_S
    with progress_bar(console, "{task.completed}/{task.total} clips") as bar:
        task = bar.add_task(label, total=total)

        def count(num_clips: int) -> None:
            nonlocal next_line
            done = min(tally.add(num_clips), total)
            bar.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and (now >= next_line or done == total):
                next_line = now + LINE_INTERVAL_S
                eta = f"  ETA {(now - started) / done * (total - done):.0f} s" if 0 < done < total else ""
                rate = done / max(now - started, 1e-9)
                print(f"{label}: {done}/{total} clips  {rate:.2f} clips/s{eta}", file=sys.stderr, flush=True)

        yield count
