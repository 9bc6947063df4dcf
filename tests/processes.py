"""Start our commands as users do, find every process of a job, and wait for what it does."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
_POLL_S = 0.1


@dataclass(frozen=True)
class Finished:
    """What a command said and how it ended."""

    status: int
    stdout: str
    stderr: str

    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith(("wan-dist:", "wan-data:"))]


def run_program(words: Sequence[object], *, timeout_s: float = 300, env: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end; its output is read from pipes, so it also ends what keeps them open."""
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=timeout_s, check=False, env=env
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run_cli(*words: object, env: Mapping[str, str] | None = None) -> Finished:
    """Run `wan-dist` with these arguments."""
    return run_program([BIN / "wan-dist", *words], env=env)


def start_program(words: Sequence[object], log: Path) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, its output in a file, so that signals to its group reach it alone."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(word) for word in words], stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )


def pids_of_job(marker: object) -> list[int]:
    """Return every living process whose command line holds `marker`, a path that no other job names."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().decode(errors="replace")  # empty for a zombie
            if str(marker) in command and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def rank_pids(marker: object) -> dict[int, int]:
    """Return process id by rank of a job's ranks."""
    ranks = {}
    for pid in pids_of_job(marker):
        with contextlib.suppress(OSError):
            entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
            values = [entry.removeprefix("RANK=") for entry in entries if entry.startswith("RANK=")]
            if values:
                ranks[int(values[0])] = pid
    return ranks


def wait_until(condition: Callable[[], object], timeout_s: float, what: str) -> float:
    """Return the seconds until `condition` was true; fail after `timeout_s`."""
    started = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - started
        assert waited_s < timeout_s, f"after {waited_s:.0f} s still not: {what}"
        time.sleep(_POLL_S)
    return time.monotonic() - started
