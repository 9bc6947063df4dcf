"""Starting the ranks of one machine through the DeepSpeed launcher, and ending them all."""

import base64
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from wan_dist.core.errors import LaunchError
from wan_dist.parallel.rank_watch import RankWatch
from wan_dist.parallel.shutdown import Deadline

logger = logging.getLogger(__name__)

# The ranks end themselves within `shutdown.GRACE_S`; what is left after this is killed.
KILL_AFTER_S = 28.0
_POLL_S = 0.1
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_KILLED = {256 - s: s for s in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)}


def deepspeed_command(devices: Sequence[str], program: Sequence[str], *, port: int) -> list[str]:
    """Return the command that starts `python -m PROGRAM` on one rank per device of this machine.

    This is what the `deepspeed` command starts on every machine; going through that one costs 4 s more of imports and
    leaves ranks behind when it is told to stop (deepspeed 0.19.8).

    Args:
        devices: accelerator ids, one per rank; numbers on a machine without.
        program: module name and its arguments.
        port: free TCP port on which the ranks meet.
    """
    hosts = json.dumps({"localhost": list(devices)})
    world_info = base64.urlsafe_b64encode(hosts.encode()).decode()
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world_info}"),
        *("--master_addr", "127.0.0.1", "--master_port", str(port)),
        # Its warnings go to stdout, which is for results; what ended the ranks is said by them or by `run_ranks`.
        *("--log_level", "critical", "--no_local_rank", "--module", *program),
    ]


def visible_devices(num_ranks: int) -> list[str]:
    """Return the ids of the devices to use: the first ones that the environment shows, else 0, 1, and so on.

    Args:
        num_ranks: devices wanted; 0 takes every one, or 1 on a machine without.

    Raises:
        LaunchError: the environment shows fewer.
    """
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return [str(i) for i in range(max(num_ranks, 1))]
    if num_ranks > count:
        raise LaunchError(f"{num_ranks} ranks were asked for, {count} GPUs are visible; one rank needs one GPU.")
    shown = next((os.environ[v] for v in _DEVICE_VARIABLES if os.environ.get(v)), "")
    ids = [i.strip() for i in shown.split(",") if i.strip()] or [str(i) for i in range(count)]
    return ids[: num_ranks or count]


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_threads(num_ranks: int) -> int:
    """Return the CPU threads of each rank so that all together use the machine once."""
    return max((os.cpu_count() or 1) // num_ranks, 1)


def run_ranks(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace_s: float = KILL_AFTER_S,
    progress: Callable[[], object | None] = lambda: None,
) -> int:
    """Run a launcher command until every process that it started is gone; return its exit status.

    The command gets a process group of its own. SIGINT and SIGTERM to this process go to the ranks and not to the
    launcher, which would kill them 30 s later whatever they are saving (`deepspeed.launcher.launch`, 0.19.8); it ends
    when they do.

    Args:
        command: launcher and ranks.
        env: environment of the command, ours if None.
        cwd: folder in which it runs.
        grace_s: seconds after a signal, or after the last progress, until the ranks are killed.
        progress: returns a value that changes while a save makes progress, None with no save under way.

    Raises:
        LaunchError: the command could not be started, or the system killed a rank.
    """
    try:
        process = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True, preexec_fn=_end_with_parent)
    except OSError as error:
        raise LaunchError(f"{command[0]}: cannot be started ({error.strerror}).") from None
    received: list[int] = []
    watch = RankWatch(process.pid)

    def forward(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = _wait_for_group(process, received, lambda: Deadline(grace_s, progress), grace_s, watch)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        # A rank that says itself that it failed, such as one that could not save, did not end by the signal.
        return status if status in (1, 2) else 128 + received[0]
    # The launcher exits with a rank's status, -9 for one that was killed, of which the system keeps the low byte; or
    # with that of another rank, which failed for want of the first.
    who, signum = watch.killed or ("a rank", _KILLED.get(status))
    if signum:
        name = signal.Signals(signum).name
        hint = "; out of memory is the usual reason (see `dmesg`)" if signum == signal.SIGKILL else ""
        raise LaunchError(f"{who} was ended by {name}{hint}.")
    return status


def _end_with_parent() -> None:
    # kill -9 of this process must end the job too; the ranks then notice that their launcher is gone.
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _wait_for_group(
    process: subprocess.Popen[bytes],
    received: Sequence[int],
    new_deadline: Callable[[], Deadline],
    grace_s: float,
    watch: RankWatch,
) -> int:
    deadline: Deadline | None = None
    told: dict[int, int] = {}
    while True:
        watch.look()
        status = process.poll()
        if status is not None and not _group_alive(process.pid):
            return status if status >= 0 else 128 - status
        if received and status is None:
            _tell_ranks(process.pid, received, told)
        if deadline is None and (received or status is not None):
            # A launcher that is gone leaves ranks only if it was killed; they notice and get the same grace.
            deadline = new_deadline()
        if deadline is not None and deadline.passed():
            logger.warning("ranks did not end, and nothing moved for %.0f s; they are killed", grace_s)
            _signal_group(process.pid, signal.SIGKILL)
            deadline = new_deadline()
        time.sleep(_POLL_S)


def _tell_ranks(launcher: int, received: Sequence[int], told: dict[int, int]) -> None:
    """Send each rank the signals that it has not had yet, also ranks that start meanwhile.

    Workers of ranks are left alone: their death could cost the save that the signal asks for.

    Args:
        launcher: process id of the command.
        received: signals that this process got.
        told: how many of them each process has had, updated in place.
    """
    ranks = [pid for _, pid, parent, _ in _processes() if parent == launcher]
    # A launcher whose ranks have ended is about to tell their status, and would die of a signal instead.
    if not ranks and told.keys() <= {launcher}:
        ranks = [launcher]
    for pid in ranks:
        for signum in received[told.get(pid, 0) :]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        told[pid] = len(received)


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # In a container whose first process never waits for orphans, ranks that ended stay in the table for ever.
    states = [state for state, _, _, member_of in _processes() if member_of == group]
    return not states or any(state != "Z" for state in states)


def _processes() -> Iterator[tuple[str, int, int, int]]:
    """Yield state letter, process id, parent and process group of every process; nothing where there is no /proc."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, group, *_ = path.read_text().rpartition(")")[2].split()
            yield state, int(path.parent.name), int(parent), int(group)
