"""The number of ranks, micro-batches and launchers changes how a step is computed, not what it computes."""

import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.conftest import Job, Material, read_rows
from tests.processes import BIN, run_cli, run_program
from wan_dist.io.checkpoint import read_manifest, step_folders

# fp32 throughout. The ranks add the same gradients in another order, which moves them by about 1e-7 relative; Adam
# divides by their size, so after k steps the weights differ by about k * lr * 1e-6 and the loss by less than this.
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def on_one_rank(material: Material) -> dict[int, Job]:
    """The steps of `fp32_on_two_ranks` on one rank, by micro-batch size; both run at the same time."""
    # DeepSpeed's build folder is a fresh one of our own, with the lock of a build that was killed in it.
    cache = material.folder / "cache"
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH_EXTENSIONS_DIR", "WAN_DIST_OWNS_EXTENSIONS_DIR")}
    env["XDG_CACHE_HOME"] = str(cache)
    where = run_program(
        [sys.executable, "-c", "from wan_dist.parallel import environment as e; print(e.private_extensions_dir())"],
        env=env,
    )
    leftover = Path(where.stdout.strip()) / "cpu_adam" / "lock"
    leftover.parent.mkdir(parents=True)
    leftover.touch()

    def train(micro: int) -> Job:
        name = f"one-rank-{micro}"
        config = material.config(
            name, model={"dtype": "fp32"}, train={"num_steps": 3, "micro_batch_size": micro}, parallel={}
        )
        finished = run_cli("train", config, env=env)
        assert finished.status == 0, finished.stderr
        return Job(config, material.run_dir(name), finished)

    with ThreadPoolExecutor(2) as pool:
        jobs: dict[int, Future[Job]] = {micro: pool.submit(train, micro) for micro in (1, 2)}
    done = {micro: job.result() for micro, job in jobs.items()}
    assert not leftover.exists()
    return done


@pytest.mark.parametrize("micro", [1, 2])
def test_loss_of_two_ranks_is_the_loss_of_one(fp32_on_two_ranks: Job, on_one_rank: dict[int, Job], micro: int) -> None:
    two, one = fp32_on_two_ranks.rows(), on_one_rank[micro].rows()
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3]
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=RELATIVE)
    # Gradients are compared through their norm: a wrong factor between ranks or micro-batches would show here at once.
    assert [row["grad_norm"] for row in one] == pytest.approx([row["grad_norm"] for row in two], rel=1e-4)


def test_a_leftover_build_lock_does_not_hang_a_start(on_one_rank: dict[int, Job]) -> None:
    assert any("left by a build that was killed" in job.finished.stderr for job in on_one_rank.values())


@pytest.mark.proof
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_every_launcher_trains_the_same(material: Material, straight: Job, launcher: str) -> None:
    config = material.config(launcher, train={"num_steps": 2})
    commands = {
        "torchrun": ["--nproc_per_node", 2, "--master_port", 29611, "-m", "wan_dist"],
        # The launcher puts --local_rank=N between the script and `train`. `deepspeed --module`: test_signals.py.
        "deepspeed": ["--num_gpus", 2, "--master_port", 29612, BIN / "wan-dist"],
    }
    finished = run_program([BIN / launcher, *commands[launcher], "train", config])
    assert finished.status == 0, finished.stderr
    rows = read_rows(material.run_dir(launcher))
    assert [row["loss"] for row in rows] == [row["loss"] for row in straight.rows()[:2]]


def test_a_finished_run_that_starts_again_changes_no_checkpoint(on_one_rank: dict[int, Job]) -> None:
    job = on_one_rank[1]
    before = step_folders(job.run_dir / "checkpoints")[0].stat()
    done = run_cli("train", job.config)
    assert done.status == 0, done.stderr
    after = step_folders(job.run_dir / "checkpoints")[0].stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert job.status()["state"] == "finished"


def test_a_damaged_newest_checkpoint_is_set_aside_and_costs_no_whole_one(
    on_one_rank: dict[int, Job], material: Material
) -> None:
    run_dir = material.folder / "run-damaged"
    shutil.copytree(on_one_rank[1].run_dir, run_dir)
    root = run_dir / "checkpoints"
    damaged = root / "step-00000009"
    shutil.copytree(root / "step-00000003", damaged)
    with next(damaged.rglob("*optim_states.pt")).open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"damaged!")
    changes = [f"run_dir={run_dir}", "train.num_steps=4", "checkpoint.keep_last=1"]
    done = run_cli("train", on_one_rank[1].config, *changes)
    assert done.status == 0, done.stderr
    assert "passed over step-00000009" in done.stderr
    assert [read_manifest(folder).step for folder in step_folders(root)] == [4]
    assert len(list(root.glob("damaged-step-00000009-*"))) == 1
