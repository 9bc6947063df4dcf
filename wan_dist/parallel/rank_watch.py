"""Which rank of a job was killed: its launcher tells a status and no more."""

import contextlib
import os
import signal
from pathlib import Path

# What nobody sends to end a job in an orderly way.
_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


class RankWatch:
    """Watches the children of a launcher, which looks at them once a second; until then an ended one is a zombie.

    Attributes:
        killed: the first rank that ended badly and the signal that ended it, such as ("rank 1", 9); None where the
            first one ended by itself, none did, or there is no /proc.
    """

    def __init__(self, launcher: int) -> None:
        """Watch the children of this process id; our user's."""
        self.killed: tuple[str, int] | None = None
        self._children = Path(f"/proc/{launcher}/task/{launcher}/children")
        self._ranks: dict[int, str] = {}
        self._over = False

    def look(self) -> None:
        """Look once; to be called several times a second."""
        if self._over:
            return
        with contextlib.suppress(OSError):
            for pid in map(int, self._children.read_text().split()):
                if pid not in self._ranks and (rank := _variable(pid, "RANK")):
                    self._ranks[pid] = rank
        ended = [(rank, status) for pid, rank in self._ranks.items() if (status := _zombie_status(pid))]
        # The launcher ends the others once one ended badly, so only the first ones count; of two at once the killed.
        for rank, status in ended:
            if os.WIFSIGNALED(status) and os.WTERMSIG(status) in _CRASHES:
                self.killed = (f"rank {rank}", os.WTERMSIG(status))
        self._over = bool(ended)


def _variable(pid: int, name: str) -> str | None:
    """Return an environment variable that a process started with."""
    prefix = f"{name}=".encode()
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((word.removeprefix(prefix).decode() for word in words if word.startswith(prefix)), None)


def _zombie_status(pid: int) -> int | None:
    """Return the wait status of an ended process that nobody waited for yet; None while it runs.

    Source: proc(5), field 52 of /proc/PID/stat.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[49]) if fields[0] == "Z" else None
    except (OSError, ValueError, IndexError):
        return None
