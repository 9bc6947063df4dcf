"""Progress for people: a bar on a terminal, plain lines elsewhere; and logging that names its rank."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

_QUIET = ("DeepSpeed", "httpx", "urllib3", "filelock")


def log_as_rank(rank: int, level: str, console: Console | None = None) -> None:
    """Send logs to stderr with the rank's number; ranks other than 0 report warnings only.

    Args:
        rank: number of this process.
        level: level of rank 0.
        console: where a progress bar is drawn, so that lines appear above it.
    """
    import warnings

    handler: logging.Handler
    if console and console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {rank}] %(levelname)s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    threading.excepthook = _thread_ended
    own = logging.getLevelNamesMapping()[level] if rank == 0 else logging.WARNING
    root.setLevel(max(own, logging.WARNING))
    logging.getLogger("wan_dist").setLevel(own)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns of a kernel that only 4-bit weights on a CPU would want, at every import (0.50).
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # torch 2.13 deprecates the collectives that DeepSpeed 0.19 calls, once per call site and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """Say in one line that a thread met a full or broken disk, as TensorBoard's does; other errors in full."""
    if isinstance(ended.exc_value, OSError):
        logger.warning("%s ended: %s", type(ended.thread).__name__, ended.exc_value)
    else:
        threading.__excepthook__(ended)


def quiet_libraries() -> None:
    """Turn off the loading bars that transformers and diffusers draw for every component."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def told_size(total_bytes: int) -> None:
    """Say what a dry run would write, of the bytes that are written and read back."""
    print(f"nothing is written in a dry run: {total_bytes / 2e9:.3f} GB of weights", file=sys.stderr)


@contextmanager
def progress_bar(console: Console, *columns: str) -> Iterator[Progress]:
    """Show a progress bar while the block runs; draws nothing where the console is no terminal.

    Args:
        console: usually one on stderr.
        columns: further text columns in rich's format, such as "{task.fields[loss]}".
    """
    parts: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        *(TextColumn(column) for column in columns),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    ]
    with Progress(*parts, console=console, disable=not console.is_terminal) as progress:
        yield progress


class ByteProgress:
    """Bytes done of a long file operation: a bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, progress: Progress, label: str) -> None:
        """Show nothing until `start`."""
        self._progress, self._label = progress, label
        self._task: TaskID | None = None
        self._done = self._total = self._told = 0

    def start(self, total_bytes: int) -> None:
        """Set the size of the whole operation."""
        self._total = max(total_bytes, 1)
        self._task = self._progress.add_task(self._label, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Count bytes done."""
        self._done += num_bytes
        if self._task is not None:
            self._progress.update(self._task, completed=self._done)
        tenths = 10 * self._done // self._total
        if self._progress.disable and tenths > self._told:
            self._told = tenths
            print(f"{self._label}: {10 * tenths} % of {self._total / 2**20:.1f} MiB", file=sys.stderr, flush=True)
