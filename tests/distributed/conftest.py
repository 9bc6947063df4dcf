"""What the tests of real ranks share: packed clips, a tiny pipeline, and jobs that several tests look at."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import pack_clips, write_config
from tests.processes import Finished, run_cli
from wan_dist.data.shapes import draw_clips
from wan_dist.models.wan.build import make_tiny_pipeline

NUM_CLIPS = 6


@dataclass(frozen=True)
class Material:
    """Six clips of 9 frames, 64x64 px, packed; a tiny ti2v-5B; and a place for configs."""

    folder: Path
    shards: Path
    model: Path

    def config(self, name: str, **sections: Any) -> Path:
        """Write the config NAME.yaml of a run in the folder NAME; `sections` go over what all jobs share."""
        shared: dict[str, dict[str, Any]] = {
            "model": {"path": str(self.model), "variant": "ti2v-5B"},
            "data": {
                "shards": str(self.shards),
                "sizes": [[64, 64]],
                "num_frames": [9],
                "fps": 8.0,
                "num_workers": 1,
            },
            "optim": {"lr": 1e-3},
            "train": {"num_steps": 4, "global_batch_size": 4, "micro_batch_size": 1},
        }
        merged = {name: {**values, **sections.pop(name, {})} for name, values in shared.items()}
        return write_config(self.folder / f"{name}.yaml", run_dir=self.run_dir(name), **merged, **sections)

    def run_dir(self, name: str) -> Path:
        return self.folder / f"run-{name}"


@dataclass(frozen=True)
class Job:
    """A job that has run."""

    config: Path
    run_dir: Path
    finished: Finished

    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.run_dir)

    def status(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "status.json").read_text())


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch(config: Path, run_dir: Path, *overrides: str, num_ranks: int = 2) -> Job:
    """Run `wan-dist launch` to its end."""
    finished = run_cli("launch", config, "--num-gpus", num_ranks, *overrides)
    assert finished.status == 0, finished.stderr
    return Job(config, run_dir, finished)


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("distributed")
    clips = draw_clips(9, 64, 64)[:NUM_CLIPS]
    shards = pack_clips(folder, clips, fps=8.0)
    model = make_tiny_pipeline("ti2v-5B", folder / "model", [clip.caption for clip in clips])
    return Material(folder, shards, model)


@pytest.fixture(scope="session")
def straight(material: Material) -> Job:
    """Four steps on two ranks without a break."""
    config = material.config("straight")
    return launch(config, material.run_dir("straight"))


@pytest.fixture(scope="session")
def resumed(material: Material) -> Job:
    """The same four steps with a stop after the second."""
    config = material.config("resumed")
    launch(config, material.run_dir("resumed"), "train.num_steps=2")
    return launch(config, material.run_dir("resumed"))


@pytest.fixture(scope="session")
def fp32_on_two_ranks(material: Material) -> Job:
    """Three steps in fp32 on two ranks; sub-groups of a few parameters instead of a billion."""
    config = material.config(
        "two-ranks",
        model={"dtype": "fp32"},
        train={"num_steps": 3},
        parallel={"deepspeed": {"zero_optimization": {"sub_group_size": 20_000}}},
    )
    return launch(config, material.run_dir("two-ranks"))
