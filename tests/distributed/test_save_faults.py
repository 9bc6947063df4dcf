"""Whatever happens during a save, what was saved before is whole, and the run goes on to the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wan_dist.io.checkpoint import Checkpoint, newest_whole, step_folders

PROGRAM = Path(__file__).with_name("faults_program.py")
TRIALS: dict[str, dict[str, Any]] = {
    "rank 1 in a shard": {"step": 3, "rank": 1, "at": 1},
    "writer of rank 1": {"step": 3, "rank": 1, "fault": "writer killed", "async": True},
    "disk full, async": {"step": 3, "fault": "disk full", "left": 20_000, "async": True},
    "disk too small": {"step": 3, "fault": "disk too small", "left": 20_000, "async": True},
}
# Those of `make proofs`.
MORE_TRIALS: dict[str, dict[str, Any]] = {
    "every point": {"stride": 1},
    "rank 0 while the writer writes": {"step": 3, "rank": 0, "at": 4, "async": True},
    "disk full": {"step": 3, "fault": "disk full", "left": 20_000},
}
KILLED = [name for name in TRIALS if name.startswith("rank")]
FULL = [name for name in TRIALS if name.startswith("disk")]


def run_trials(folder: Path, trials: dict[str, dict[str, Any]], timeout_s: float) -> dict[str, Any]:
    """Run trials in a mount namespace with a disk of 4 MB of their own, where that is allowed."""
    (folder / "trials.json").write_text(json.dumps(trials))
    (folder / "small").mkdir()
    command = [sys.executable, str(PROGRAM), str(folder), str(folder / "trials.json")]
    if _may_mount():
        mount = 'mount -t tmpfs -o size=4m tmpfs "$1" && shift && exec "$@"'
        command = ["unshare", "-m", "sh", "-c", mount, "sh", str(folder / "small"), *command]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(PROGRAM.parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    return json.loads((folder / "results.json").read_text())


def _may_mount() -> bool:
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=4k tmpfs /mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return run_trials(folder, TRIALS, 500)


def assert_recovered(result: dict[str, Any], clean: dict[str, Any]) -> None:
    assert result["left"] in (2, 3)  # the save that was struck, or the one before it, whole
    assert result["again"]["statuses"] == [0, 0]
    assert result["again"]["digest"] == clean["again"]["digest"]
    assert result["final"] == 4
    assert not [name for name in result["folders"] if name.startswith(".tmp")]


@pytest.mark.proof
@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_costs_the_save_under_way_and_no_more(results: dict[str, Any], name: str) -> None:
    result = results[name]
    assert -signal.SIGKILL in result["first"]["statuses"]
    assert result["first"]["survivor_s"] < 30
    assert_recovered(result, results["clean"])


@pytest.mark.proof
def test_a_killed_writer_costs_one_save_and_training_goes_on(results: dict[str, Any]) -> None:
    result = results["writer of rank 1"]
    assert result["first"]["statuses"] == [0, 0]
    ((step, problem),) = result["first"]["problems"].items()
    assert step == "3"
    assert "rank 1: the writer process" in problem
    assert "ended" in problem
    assert result["first"]["digest"] == results["clean"]["first"]["digest"]
    assert result["folders"] == ["latest", "step-00000002", "step-00000004"]


def assert_refused(name: str, result: dict[str, Any], clean: dict[str, Any]) -> None:
    assert result["first"]["statuses"] == [0, 0]
    ((step, problem),) = result["first"]["problems"].items()
    assert step == "3"
    assert ("are needed" if name == "disk too small" else "space") in problem.lower()
    assert result["first"]["digest"] == clean["first"]["digest"]
    assert result["folders"] == ["latest", "step-00000002", "step-00000004"]


@pytest.mark.proof
@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_costs_one_save_and_training_goes_on(results: dict[str, Any], name: str) -> None:
    if not _may_mount():
        pytest.skip("mounting a small disk needs root in a namespace of its own")
    assert_refused(name, results[name], results["clean"])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 3)


def _zero_tail(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(-16, os.SEEK_END)
        stream.write(bytes(16))


KINDS = [
    "manifest.json",
    "rng-00001.safetensors",
    "transformer/*_rank_0_*_model_states.pt",
    "*/*_rank_1_*optim_states.pt",
]
DAMAGES: list[Callable[[Path], None]] = [_flip, _cut, _zero_tail, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_of_any_kind_is_named_and_passed_over(
    results: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    kind: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert results
    root = tmp_path / "checkpoints"
    shutil.copytree(folder / "clean", root)
    newest, older = step_folders(root)
    (path,) = newest.glob(kind)
    damage(path)
    found = newest_whole(root)
    assert isinstance(found, Checkpoint)
    assert found.folder == older
    assert path.name in caplog.text


@pytest.mark.parametrize("pointer", ["", "garbage\n", "step-99999999\n", None])
def test_the_pointer_decides_nothing(
    results: dict[str, Any], folder: Path, tmp_path: Path, pointer: str | None
) -> None:
    assert results
    root = tmp_path / "checkpoints"
    shutil.copytree(folder / "clean", root)
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_text(pointer)
    found = newest_whole(root)
    assert found is not None
    assert found.step == 4


@pytest.mark.proof
def test_kill_at_every_write_of_a_save(tmp_path: Path) -> None:
    """kill -9 of either rank before each thing that it does to the disk, half-written files among them."""
    results = run_trials(tmp_path, MORE_TRIALS, 900)
    clean = results.pop("clean")
    if full := results.pop("disk full", None):
        assert_refused("disk full", full, clean)
    assert min(clean["first"]["points"]) > 8
    assert len(results) == sum(clean["first"]["points"]) + 1
    for name, result in results.items():
        assert -signal.SIGKILL in result["first"]["statuses"], name
        assert_recovered(result, clean)
