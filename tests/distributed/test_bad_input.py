"""What users get wrong, through the real commands: one line that says so, the right exit status, no traceback."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed.conftest import Job, Material, launch
from tests.jobs import pack_clips
from tests.processes import Finished, run_cli
from wan_dist.data.shapes import draw_clips
from wan_dist.io.checkpoint import step_folders

QUIET = "log.level=ERROR"
Command = tuple[object, ...]


def assert_one_line(finished: Finished, status: int, *parts: str) -> None:
    """Assert the exit status, and that stderr is one line that holds every part."""
    assert finished.status == status, finished.stderr
    assert "Traceback" not in finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("wan-dist: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def done(material: Material) -> Job:
    """A finished one-step run on one rank."""
    config = material.config("done", train={"num_steps": 1})
    return launch(config, material.run_dir("done"), num_ranks=1)


def run_all(commands: Mapping[str, Command]) -> dict[str, Finished]:
    """Run commands, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(lambda words: run_cli(*words), commands.values()), strict=True))


def altered_model(material: Material, name: str, alter: Callable[[Path], None]) -> Path:
    """Return a copy of the tiny pipeline with something wrong in its transformer's folder."""
    folder = material.folder / f"model-{name}"
    shutil.copytree(material.model, folder)
    alter(folder / "transformer")
    return folder


def _weights(folder: Path) -> Path:
    return folder / "diffusion_pytorch_model.safetensors"


def _cut(folder: Path) -> None:
    with _weights(folder).open("r+b") as stream:
        stream.truncate(_weights(folder).stat().st_size // 2)


def _narrow(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "ffn_dim": config["ffn_dim"] * 2}))


# Refused by the launch command itself, before any rank starts.
EARLY: dict[str, tuple[list[str], int, list[str]]] = {
    "unknown key": (["train.num_stepss=5"], 2, ["train.num_stepss", "did you mean train.num_steps?"]),
    "not 4n+1": (["data.num_frames=[80]"], 2, ["80 is not 4n+1; use 77 or 81"]),
    "81 as 4n": (["data.num_frames=[82]"], 2, ["82 is not 4n+1; use 81 or 85"]),
    "not a multiple": (["data.sizes=[[70, 64]]"], 2, ["width is not a multiple of 32; use 64 or 96"]),
    "micro-batch": (["train.micro_batch_size=3"], 2, ["global_batch_size = 4 is not a multiple of"]),
    "ranks": (["train.global_batch_size=9"], 2, ["does not divide by micro_batch_size 1 x 2 ranks", "use 1 or 3 or 9"]),
    "no model": (["model.path=/nowhere/model"], 2, ["model.path = /nowhere/model: there is no such folder"]),
    "no shards": (["data.shards=/nowhere/shards"], 2, ["data.shards = /nowhere/shards", "wan-data pack"]),
    "deepspeed key": (["parallel.deepspeed={bf16: {enabled: false}}"], 2, ["parallel.deepspeed.bf16", "collides"]),
}


@pytest.fixture(scope="module")
def early(material: Material) -> dict[str, Finished]:
    config = material.config("early")
    commands = {name: ("launch", config, "--num-gpus", 2, *case[0]) for name, case in EARLY.items()}
    return run_all(commands)


@pytest.mark.parametrize("name", EARLY)
def test_launch_refuses_before_ranks_start(early: dict[str, Finished], material: Material, name: str) -> None:
    _, status, parts = EARLY[name]
    assert_one_line(early[name], status, *parts)
    assert not material.run_dir("early").exists()


RESUME: dict[str, tuple[list[str], list[str]]] = {
    "require": (["run_dir={new}", "checkpoint.resume=require"], ["resume is require", "no whole checkpoint"]),
    "never": (["checkpoint.resume=never"], ["resume is never", "choose another run_dir"]),
    "seed": (["train.seed=7"], ["seed = 0, this run has 7"]),
    "batch": (["train.global_batch_size=2"], ["global_batch_size = 4, this run has 2"]),
    "data": (["data.shards={other}"], ["was saved with data_digest"]),
}


@pytest.fixture(scope="module")
def refused_resumes(material: Material, done: Job) -> dict[str, Finished]:
    other = pack_clips(material.folder / "other", draw_clips(9, 64, 64)[8:10], fps=8.0)
    names = {"new": material.folder / "run-new", "other": other}
    # They run at the same time, and one process at a time may claim a run folder: each gets a copy.
    copies = {name: material.folder / f"run-refused-{name}" for name in (*RESUME, "ranks")}
    for copy in copies.values():
        shutil.copytree(done.run_dir, copy)
    commands: dict[str, Command] = {
        name: ("train", done.config, QUIET, f"run_dir={copies[name]}", *[change.format(**names) for change in changes])
        for name, (changes, _) in RESUME.items()
    }
    commands["ranks"] = ("launch", done.config, "--num-gpus", 2, QUIET, f"run_dir={copies['ranks']}", "train.seed=5")
    return run_all(commands)


@pytest.mark.parametrize("name", RESUME)
def test_a_resume_that_would_be_another_run_names_the_field(refused_resumes: dict[str, Finished], name: str) -> None:
    assert_one_line(refused_resumes[name], 1, *RESUME[name][1])


def test_a_mistake_is_said_once_by_two_ranks(refused_resumes: dict[str, Finished]) -> None:
    assert_one_line(refused_resumes["ranks"], 1, "was saved with seed = 0, this run has 5")


def test_a_refused_start_leaves_the_run_folder_as_it_was(refused_resumes: dict[str, Finished], done: Job) -> None:
    assert refused_resumes
    for name in ("seed", "batch", "data", "never"):
        copy = done.run_dir.with_name(f"run-refused-{name}")
        assert (copy / "config.yaml").read_text() == (done.run_dir / "config.yaml").read_text()
        assert json.loads((copy / "status.json").read_text())["state"] == "finished"


STARTS: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "cut": (_cut, [], ["cannot be read as safetensors"]),
    "no weights": (lambda folder: _weights(folder).unlink(), [], ["has neither diffusion_pytorch_model.safetensors"]),
    "other shape": (_narrow, [], ["has shape", "config.json says"]),
    "wrong variant": (
        lambda folder: None,
        ["model.variant=t2v-A14B", "model.expert=high_noise"],
        ["in/out channels are 48/48, t2v-A14B has 16/16"],
    ),
    "DeepSpeed's typo": (
        lambda folder: None,
        ["parallel.deepspeed={zero_optimization: {zero_hpz_partition_sizee: 2}}"],
        ["parallel.deepspeed: DeepSpeed refuses zero_hpz_partition_sizee"],
    ),
    "DeepSpeed's place": (
        lambda folder: None,
        ["parallel.deepspeed={zero_hpz_partition_size: 2}"],
        ["write parallel.deepspeed: {zero_optimization: {zero_hpz_partition_size: 2}}"],
    ),
    "no LoRA": (
        lambda folder: None,
        ["method={kind: lora, init_from: {transformer: nope.safetensors}}"],
        ["nope.safetensors: there is no such file"],
    ),
    "no VAE": (lambda folder: shutil.rmtree(folder.parent / "vae"), [], ["vae: missing"]),
}


@pytest.fixture(scope="module")
def refused_starts(material: Material) -> dict[str, Finished]:
    config = material.config("models")
    commands: dict[str, Command] = {}
    for name, (alter, changes, _) in STARTS.items():
        model = altered_model(material, re.sub(r"\W+", "-", name), alter)
        run_dir = material.folder / f"run-of-{model.name}"
        commands[name] = ("train", config, QUIET, f"model.path={model}", f"run_dir={run_dir}", *changes)
    return run_all(commands)


@pytest.mark.parametrize("name", STARTS)
def test_what_cannot_work_is_named_before_the_first_step(refused_starts: dict[str, Finished], name: str) -> None:
    assert_one_line(refused_starts[name], 2, *STARTS[name][2])


def test_consolidate_refuses_what_it_cannot_do(material: Material, done: Job) -> None:
    newest = step_folders(done.run_dir / "checkpoints")[0]
    damaged = material.folder / "damaged" / newest.name
    shutil.copytree(newest, damaged)
    optimizer = next(damaged.rglob("*optim_states.pt"))
    with optimizer.open("r+b") as stream:
        stream.truncate(optimizer.stat().st_size - 1)
    out = material.folder / "export"
    full = material.folder / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    outcomes = run_all(
        {
            "full": ("consolidate", done.run_dir, full),
            "damaged": ("consolidate", damaged, out),
            "no run": ("consolidate", material.model, out),
            "nothing": ("consolidate", material.folder / "absent", out),
            "shards": ("consolidate", material.shards, out),
        }
    )
    assert_one_line(outcomes["full"], 1, "exists and is not empty")
    assert_one_line(outcomes["damaged"], 1, optimizer.name, "bytes")
    assert_one_line(outcomes["no run"], 1, "no whole checkpoint", "give a run or checkpoint folder")
    assert_one_line(outcomes["nothing"], 1, "no whole checkpoint")
    assert_one_line(outcomes["shards"], 1, "not a checkpoint's")
    assert not out.exists()
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
