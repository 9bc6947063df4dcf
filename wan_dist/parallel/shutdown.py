"""Ending a job: signals, a launcher that died, and ranks that no longer answer.

A rank that is told to stop finishes its step, agrees with the others, saves and leaves. If that takes longer than
the grace time (another rank is gone, a collective hangs), the process ends itself: no orphan survives.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

GRACE_S = 120.0
_LAUNCHER_POLL_S = 1.0
_SECOND_INTERRUPT_S = 1.0
_LAUNCHER_PROGRAMS = {"deepspeed", "torchrun"}
_LAUNCHER_MODULES = ("deepspeed.launcher", "torch.distributed")


class Deadline:
    """A point in time that moves on as long as something makes progress."""

    def __init__(self, grace_s: float, progress: Callable[[], object | None]) -> None:
        """Begin now.

        Args:
            grace_s: seconds without progress after which the time is up.
            progress: returns a value that changes with progress, None while there is nothing to wait for.
        """
        self._grace_s, self._progress = grace_s, progress
        self._seen: object | None = None
        self._since = time.monotonic()

    def passed(self) -> bool:
        """Return whether nothing moved for the grace time; to be asked every second or so."""
        seen = self._progress()
        if seen is not None and seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since > self._grace_s


@dataclass
class StopRequest:
    """Whether this process was told to stop, and by what.

    Attributes:
        signum: the first signal received, None while the job may go on.
        grace_s: seconds between the first signal, or the last progress of a save, and the forced end.
        progress: returns a value that changes while a save makes progress, None with no save under way.
        before_force: called just before the forced end, with what led to it.
    """

    signum: int | None = None
    grace_s: float = GRACE_S
    progress: Callable[[], object | None] | None = None
    before_force: Callable[[str], None] | None = None
    _since: float = field(default=0.0, repr=False)

    @property
    def requested(self) -> bool:
        """Whether the job should end at the next step boundary."""
        return self.signum is not None

    def exit_code(self) -> int:
        """Return the shell's code for an end by this signal, e.g. 143 for SIGTERM; 0 if none came."""
        return 0 if self.signum is None else 128 + self.signum

    def handle(self, signum: int, _frame: FrameType | None = None) -> None:
        """Note the signal, start the grace time; a second Ctrl-C ends the process at once."""
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
            if os.environ.get("RANK", "0") == "0":
                os.write(2, f"{signal.Signals(signum).name}: stopping after this step\n".encode())
            threading.Thread(target=self._force_late, args=(128 + signum,), daemon=True).start()
        elif signum == signal.SIGINT and now - self._since > _SECOND_INTERRUPT_S:
            # Launchers repeat signals within milliseconds; a person pressing Ctrl-C again means it.
            os._exit(128 + signum)

    def wait(self, timeout_s: float) -> bool:
        """Return whether the job is told to stop within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.requested

    def _force_late(self, code: int) -> None:
        deadline = Deadline(self.grace_s, lambda: self.progress() if self.progress else None)
        while not deadline.passed():
            time.sleep(min(self.grace_s / 10, 1.0))
        self._force(code)

    def _force(self, code: int) -> None:
        why = f"{self.grace_s:.0f} s of grace"
        try:
            if self.before_force:
                self.before_force(f"ended by force after {why}")
        finally:
            force_exit(code, why)

    def install(self) -> None:
        """Handle SIGTERM and SIGINT with this object and end with the launcher; main thread only."""
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)
        watch_launcher()


def force_exit(code: int, why: str) -> None:
    """End this process now, its stacks on stderr: a collective that waits for a dead rank never returns."""
    print(f"wan-dist: ending by force after {why}; every thread stood here:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)
    os._exit(code)


def _parent_of(pid: int) -> int:
    try:
        # The command name, in brackets, may itself hold brackets and spaces.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # A shell whose command only mentions a launcher is none: it may end while the job goes on.
    if not Path(words[0]).name.startswith("python"):
        return False
    return any(Path(word).name in _LAUNCHER_PROGRAMS for word in words[1:3]) or any(
        module in word for word in words[1:4] for module in _LAUNCHER_MODULES
    )


def launcher_pids() -> list[int]:
    """Return the launcher processes above this one, nearest first; empty for a rank started by hand."""
    pids: list[int] = []
    pid = os.getppid()
    while pid > 1 and _is_launcher(pid):
        pids.append(pid)
        pid = _parent_of(pid)
    return pids


def watch_launcher() -> threading.Thread | None:
    """Send this process SIGTERM once a launcher above it is gone.

    The `deepspeed` command dies of SIGTERM without telling its `deepspeed.launcher.launch` child (0.19.8), and
    nothing outlives kill -9: without this the ranks train on as orphans.
    """
    chain = launcher_pids()
    if not chain or not Path("/proc").is_dir():
        return None

    def watch() -> None:
        above = {pid: _parent_of(pid) for pid in chain}
        while True:
            time.sleep(_LAUNCHER_POLL_S)
            gone = os.getppid() != chain[0] or any(
                _parent_of(pid) != parent for pid, parent in above.items() if pid != chain[-1]
            )
            if gone:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, name="watch-launcher", daemon=True)
    thread.start()
    return thread
