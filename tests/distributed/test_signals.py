"""However a job is ended, all of it ends in time, the exit status says so, and what was reached is saved."""

import contextlib
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.distributed.conftest import Job, Material, launch, read_rows
from tests.processes import BIN, pids_of_job, rank_pids, run_program, start_program, wait_until
from wan_dist.io.checkpoint import newest_whole
from wan_dist.io.run_folder import read_status

START_S = 240  # a start takes 10 s on two idle cores; this one bounds a loaded machine
GONE_WITHIN_S = 30
ENDLESS = {"train": {"num_steps": 100_000}, "checkpoint": {"save_every": 0, "keep_last": 1}}


class Endless:
    """A job on two ranks that trains until something ends it."""

    def __init__(self, material: Material, name: str, words: list[object] | None = None) -> None:
        self.config = material.config(name, **ENDLESS)
        self.run_dir = material.run_dir(name)
        self.log = material.folder / f"{name}.log"
        words = words or [BIN / "wan-dist", "launch", self.config, "--num-gpus", 2]
        self.process = start_program([w if w is not None else self.config for w in words], self.log)

    def wait_for_ranks(self) -> dict[int, int]:
        wait_until(lambda: len(rank_pids(self.config)) == 2, START_S, "two ranks started")
        return rank_pids(self.config)

    def wait_for_steps(self) -> None:
        def stepped() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return len(read_rows(self.run_dir)) >= 2

        wait_until(stepped, START_S, "two steps done")

    def wait_for_end(self) -> int:
        """Wait until every process is gone; return the exit status of the command."""
        try:
            wait_until(self._gone, GONE_WITHIN_S, f"all processes gone\n{self.log.read_text()}")
        finally:
            for pid in pids_of_job(self.config):
                os.kill(pid, signal.SIGKILL)
        return self.process.wait(timeout=5)

    def _gone(self) -> bool:
        self.process.poll()  # takes the ended command out of the process table
        return not pids_of_job(self.config)

    def saved_step(self) -> int:
        checkpoint = newest_whole(self.run_dir / "checkpoints")
        return checkpoint.step if checkpoint else 0


def assert_stopped_and_saved(job: Endless, exit_code: int) -> None:
    status = read_status(job.run_dir)
    assert (status["state"], status["exit_code"]) == ("stopped", exit_code)
    assert status["step"] == job.saved_step() == read_rows(job.run_dir)[-1]["step"] >= 2


def test_sigterm_saves_the_step_reached_and_the_run_resumes(material: Material) -> None:
    job = Endless(material, "sigterm")
    job.wait_for_steps()
    job.process.terminate()
    assert job.wait_for_end() == 128 + signal.SIGTERM
    assert_stopped_and_saved(job, 128 + signal.SIGTERM)
    assert "Traceback" not in job.log.read_text()
    reached = job.saved_step()
    resumed = launch(job.config, job.run_dir, f"train.num_steps={reached + 1}")
    assert [row["step"] for row in resumed.rows()] == list(range(1, reached + 2))
    assert resumed.status()["state"] == "finished"


@pytest.mark.proof
def test_ctrl_c_ends_the_whole_job(material: Material) -> None:
    job = Endless(material, "ctrl-c")
    job.wait_for_steps()
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.wait_for_end() == 128 + signal.SIGINT
    assert_stopped_and_saved(job, 128 + signal.SIGINT)
    assert "Traceback" not in job.log.read_text()


@pytest.mark.proof
def test_sigterm_to_the_deepspeed_command_leaves_no_orphan(material: Material, straight: Job) -> None:
    words: list[object] = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", 29621, "--module", "wan_dist", "train"]
    job = Endless(material, "deepspeed-sigterm", [*words, None])
    job.wait_for_steps()
    # This launcher trains like the others.
    assert [row["loss"] for row in read_rows(job.run_dir)[:2]] == [row["loss"] for row in straight.rows()[:2]]
    job.process.terminate()
    assert job.wait_for_end() != 0
    assert_stopped_and_saved(job, 128 + signal.SIGTERM)


@pytest.mark.proof
def test_kill_of_the_launch_command_leaves_no_orphan(material: Material) -> None:
    job = Endless(material, "kill-launch")
    job.wait_for_steps()
    job.process.kill()
    assert job.wait_for_end() == -signal.SIGKILL
    assert_stopped_and_saved(job, 128 + signal.SIGTERM)


@pytest.mark.proof
@pytest.mark.parametrize("rank", [0, 1])
def test_kill_of_one_rank_ends_the_others(material: Material, rank: int) -> None:
    job = Endless(material, f"kill-rank-{rank}")
    job.wait_for_steps()
    os.kill(rank_pids(job.config)[rank], signal.SIGKILL)
    assert job.wait_for_end() == 1
    log = job.log.read_text()
    assert f"rank {rank} was ended by SIGKILL" in log.splitlines()[-1]
    status = read_status(job.run_dir)
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["error"] in log.splitlines()[-1]
    assert status["step"] >= 2


@pytest.mark.proof
def test_sigterm_on_a_full_disk_ends_with_the_line_that_says_what_is_saved(material: Material) -> None:
    """The disk is a small one in a namespace of the job's own, seen through /proc."""
    run_dir = material.run_dir("full")
    run_dir.mkdir()
    mount = 'mount -t tmpfs -o size=64m none "$1" && shift && exec "$@"'
    words: list[object] = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", run_dir]
    probe = [*words[:5], "mount -t tmpfs -o size=4k none /mnt"]
    if not shutil.which("unshare") or run_program(probe).status:
        pytest.skip("mounting a small disk needs a namespace of its own")
    job = Endless(material, "full", [*words, BIN / "wan-dist", "launch", None, "--num-gpus", 2])
    job.run_dir = Path(f"/proc/{job.process.pid}/root{run_dir}")
    job.wait_for_steps()
    with contextlib.suppress(OSError), (job.run_dir / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    job.process.terminate()
    assert job.wait_for_end() == 1
    log = job.log.read_text()
    assert "Traceback" not in log
    (said,) = [line for line in log.splitlines() if line.startswith("wan-dist: ")]
    assert "could not be saved" in said
    assert "nothing was saved before" in said
    assert "status.json could not be written" in log
    assert len(log.splitlines()) < 40, log


def test_sigterm_during_start_ends_the_job(material: Material) -> None:
    job = Endless(material, "sigterm-at-start")
    job.wait_for_ranks()
    job.process.terminate()
    assert job.wait_for_end() == 128 + signal.SIGTERM
    assert not (job.run_dir / "status.json").exists() or read_status(job.run_dir)["state"] in ("stopped", "failed")
