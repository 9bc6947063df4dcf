import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wan_dist.core.errors import LaunchError
from wan_dist.parallel.environment import STALE_AFTER_S, build_guard, prepare_environment, private_extensions_dir

OWN = "WAN_DIST_OWNS_EXTENSIONS_DIR"
HOLD = """
import sys, time
from wan_dist.parallel.environment import build_guard
with build_guard():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build folder with the lock that a killed build of cpu_adam left."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(OWN, raising=False)
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    return tmp_path


@pytest.fixture
def holder(extensions: Path) -> "subprocess.Popen[str]":
    """Another process that holds the guard."""
    (extensions / "cpu_adam" / "lock").unlink()
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_leftover_in_the_private_folder_is_removed_at_once(
    extensions: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(OWN, "1")
    started = time.monotonic()
    with build_guard():
        assert not (extensions / "cpu_adam" / "lock").exists()
    assert time.monotonic() - started < 5
    assert f"removed {extensions / 'cpu_adam' / 'lock'}" in caplog.text


def test_a_stale_leftover_in_a_users_folder_is_named_and_kept(extensions: Path) -> None:
    lock = extensions / "cpu_adam" / "lock"
    old = time.time() - STALE_AFTER_S - 60
    os.utime(lock, (old, old))
    with (
        pytest.raises(LaunchError, match="left 11 min ago by a build that was probably killed") as caught,
        build_guard(),
    ):
        pass
    assert str(caught.value).startswith(str(lock))
    assert lock.exists()


def test_a_stale_lock_that_nobody_waits_for_is_left_alone(extensions: Path) -> None:
    lock = extensions / "cpu_adam" / "lock"
    old = time.time() - STALE_AFTER_S - 60
    os.utime(lock, (old, old))
    with build_guard(builds=False):
        assert lock.exists()


def test_a_fresh_lock_in_a_users_folder_may_be_a_build_under_way(extensions: Path) -> None:
    with build_guard():
        assert (extensions / "cpu_adam" / "lock").exists()


def test_two_processes_exclude_each_other(holder: "subprocess.Popen[str]") -> None:
    try:
        with pytest.raises(LaunchError, match="another process has been building"), build_guard(wait_s=0.5):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_kill_of_the_holder_frees_the_guard(holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with build_guard(wait_s=5):
        pass


def test_the_private_folder_depends_on_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = private_extensions_dir()
    assert ours.parent == tmp_path / "wan_dist" / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", "/another/venv")
    assert private_extensions_dir() != ours


def test_prepare_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "mine")
    monkeypatch.delenv(OWN, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
    assert os.environ["DS_ACCELERATOR"] == "mine"
    assert OWN not in os.environ
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"


def test_prepare_makes_a_folder_of_its_own_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "unused")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv(OWN, "0")
    prepare_environment()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(private_extensions_dir())
    assert os.environ[OWN] == "1"
