import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.processes import pids_of_job, wait_until
from wan_dist.core.errors import LaunchError
from wan_dist.parallel.launch import deepspeed_command, rank_threads, run_ranks, visible_devices

RUN_RANKS = "import sys; from wan_dist.parallel.launch import run_ranks; sys.exit(run_ranks(sys.argv[1:]))"


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def test_the_command_starts_our_module_on_every_rank() -> None:
    command = deepspeed_command(["2", "5"], ["wan_dist", "train", "a.yaml", "train.num_steps=1"], port=1234)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    encoded = command[3].removeprefix("--world_info=")
    assert json.loads(base64.urlsafe_b64decode(encoded)) == {"localhost": ["2", "5"]}
    assert command[-5:] == ["--module", "wan_dist", "train", "a.yaml", "train.num_steps=1"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_gpus_the_ranks_are_counted() -> None:
    assert visible_devices(0) == ["0"]
    assert visible_devices(2) == ["0", "1"]


def test_the_gpus_that_the_environment_shows_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert visible_devices(0) == ["4", "6", "7"]
    assert visible_devices(2) == ["4", "6"]
    with pytest.raises(LaunchError, match="4 ranks were asked for, 3 GPUs are visible"):
        visible_devices(4)


def test_ranks_share_the_cores() -> None:
    cores = os.cpu_count() or 1
    assert rank_threads(1) == cores
    assert rank_threads(10 * cores) == 1


@pytest.mark.parametrize("status", [0, 1, 2, 143])
def test_the_exit_status_is_the_commands(status: int) -> None:
    assert run_ranks(python(f"raise SystemExit({status})")) == status


def test_a_rank_killed_by_the_system_is_named() -> None:
    # DeepSpeed's launcher ends with its rank's status, and -9 arrives as 247.
    with pytest.raises(LaunchError, match="a rank was ended by SIGKILL"):
        run_ranks(python("raise SystemExit(247)"))


def test_the_rank_that_was_killed_is_named_though_the_launcher_saw_another_fail() -> None:
    rank = "import os, time; time.sleep(1); os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(600)"
    launcher = (
        "import os, subprocess, sys, time\n"
        f"ranks = [subprocess.Popen([sys.executable, '-c', {rank!r}], env={{**os.environ, 'RANK': r}}) for r in '01']\n"
        "time.sleep(3)\n"  # looks once a second
        "ranks[0].terminate(), ranks[0].wait()\n"
        "sys.exit(1)\n"
    )
    with pytest.raises(LaunchError, match="rank 1 was ended by SIGKILL; out of memory"):
        run_ranks(python(launcher))


def test_a_rank_that_says_that_it_failed_did_not_end_by_the_signal(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    program = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )
    launcher = (
        "import subprocess, sys, time\n"
        "status = subprocess.run(sys.argv[1:]).returncode\n"
        "time.sleep(1)\n"  # a signal now would cost the status
        "sys.exit(status)\n"
    )
    process = subprocess.Popen(python(RUN_RANKS, *python(launcher, *python(program, marker))))
    wait_until(marker.exists, 60, "the command started")
    process.terminate()
    assert process.wait(timeout=30) == 1


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(LaunchError, match="/nowhere/python: cannot be started"):
        run_ranks(["/nowhere/python"])


def test_the_signal_reaches_processes_whose_parent_died_of_it(tmp_path: Path) -> None:
    """The `deepspeed` command dies of SIGTERM and leaves its children: run_ranks waits for those too."""
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(1)\n"
        "    pathlib.Path(sys.argv[1]).write_text('saved')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(sys.argv[1]).write_text('started')\n"
        "time.sleep(600)\n"
    )
    state = tmp_path / "state"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, {str(child)!r}, {str(state)!r}])"
    process = subprocess.Popen(python(RUN_RANKS, *python(parent)))
    wait_until(lambda: state.exists() and state.read_text() == "started", 60, "the child started")
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert state.read_text() == "saved"
    assert pids_of_job(child) == []


def test_kill_of_the_caller_ends_the_command(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    sleeper = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    process = subprocess.Popen(python(RUN_RANKS, *python(sleeper, marker)))
    wait_until(marker.exists, 60, "the command started")
    process.kill()
    process.wait()
    wait_until(lambda: not pids_of_job(marker), 10, "the command ended")


def test_orphans_that_nobody_waits_for_do_not_count_as_alive(tmp_path: Path) -> None:
    """The group's last process stays a zombie of a parent outside the group that never waits."""
    program = (
        "import os, subprocess, sys, time\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    time.sleep(0.5)\n"  # ends after run_ranks' own child, as a rank does
        "    os._exit(0)\n"
        "os._exit(0)\n"
    )
    keeper = (
        "import ctypes, sys, time\n"
        "ctypes.CDLL(None).prctl(36, 1)\n"  # PR_SET_CHILD_SUBREAPER: orphans come here and are never waited for
        "from wan_dist.parallel.launch import run_ranks\n"
        "print(run_ranks([sys.executable, '-c', sys.argv[1]]))\n"
    )
    started = time.monotonic()
    done = subprocess.run(python(keeper, program), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "0\n", done.stderr
    assert time.monotonic() - started < 20
