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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from wan_dist.core.errors import LaunchError

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


def run_ranks(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
    """Run a launcher command until every process that it started is gone; return its exit status.

    The command gets a process group of its own. SIGINT and SIGTERM to this process go to the whole group, because
    the `deepspeed` command would die of them and leave its ranks behind.

    Raises:
        LaunchError: the command could not be started, or the system killed a rank.
    """
    try:
        process = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True, preexec_fn=_end_with_parent)
    except OSError as error:
        raise LaunchError(f"{command[0]}: cannot be started ({error.strerror}).") from None
    received: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        _signal_group(process.pid, signum)

    previous = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = _wait_for_group(process, received)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        return 128 + received[0]
    # The launcher exits with a rank's status, -9 for one that was killed, of which the system keeps the low byte.
    if status in _KILLED:
        name = signal.Signals(_KILLED[status]).name
        raise LaunchError(f"a rank was ended by {name}; out of memory is the usual reason (see `dmesg`).")
    return status


def _end_with_parent() -> None:
    # kill -9 of this process must end the job too; the ranks then notice that their launcher is gone.
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _wait_for_group(process: subprocess.Popen[bytes], received: Sequence[int]) -> int:
    deadline: float | None = None
    while True:
        status = process.poll()
        if status is not None and not _group_alive(process.pid):
            return status if status >= 0 else 128 - status
        if deadline is None and (received or status is not None):
            # A launcher that is gone leaves ranks only if it was killed; they notice and get the same grace.
            deadline = time.monotonic() + KILL_AFTER_S
        if deadline is not None and time.monotonic() > deadline:
            logger.warning("ranks did not end within %.0f s and are killed", KILL_AFTER_S)
            _signal_group(process.pid, signal.SIGKILL)
            deadline = time.monotonic() + KILL_AFTER_S
        time.sleep(_POLL_S)


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signum)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    # In a container whose first process never waits for orphans, ranks that ended stay in the table for ever.
    states = [state for state, member_of in _processes() if member_of == group]
    return not states or any(state != "Z" for state in states)


def _processes() -> Iterator[tuple[str, int]]:
    """Yield state letter and process group of every process; nothing where there is no /proc."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            yield state, int(group)
