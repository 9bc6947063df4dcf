"""Many short runs of two ranks, and all that their checkpoints hold."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.jobs import pack_clips, write_config
from wan_dist.data.shapes import draw_clips
from wan_dist.io.checkpoint import Checkpoint, average_name, folder_name, read_manifest
from wan_dist.io.component_weights import trained_tensors
from wan_dist.io.zero_shards import ShardedTensor, master_weights, open_shards
from wan_dist.models.wan.build import make_tiny_pipeline

PROGRAM = Path(__file__).with_name("rank_server.py")
VARIANTS = ("ti2v-5B", "t2v-A14B")


class Ranks:
    """Ranks of a job that were started."""

    def __init__(self, server: subprocess.Popen[str], log: Path) -> None:
        self._server, self.log = server, log
        self.pids: list[int] = self._answer()["pids"]

    def _answer(self) -> dict[str, list[int]]:
        assert self._server.stdout
        line = self._server.stdout.readline()
        assert line, "the server of ranks ended"
        return json.loads(line)

    def wait(self) -> list[int]:
        """Return the ranks' exit statuses, negative ones for signals."""
        return self._answer()["statuses"]

    def steps_done(self) -> int:
        """Return the number of steps that this job has reported."""
        return len(re.findall(r"step \d+/\d+", self.log.read_text())) if self.log.exists() else 0

    def writer_of(self, rank: int) -> int | None:
        """Return the process that writes a rank's checkpoints, if it was started."""
        children = Path(f"/proc/{self.pids[rank]}/task/{self.pids[rank]}/children")
        try:
            return next(map(int, children.read_text().split()), None)
        except OSError:
            return None


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Clips, tiny pipelines and a server of ranks."""

    folder: Path
    server: subprocess.Popen[str]

    def config(self, name: str, *, variant: str = "ti2v-5B", **sections: Any) -> Path:
        shared: dict[str, dict[str, Any]] = {
            "model": {"path": str(self.folder / variant), "variant": variant},
            "data": {
                "shards": str(self.folder / "shards"),
                "sizes": [[64, 64]],
                "num_frames": [5],
                "fps": 8.0,
                "num_workers": 0,
            },
            # Every step has a rate of its own, so that a wrong one shows.
            "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2},
            "train": {"num_steps": 4, "global_batch_size": 2, "micro_batch_size": 1},
            "checkpoint": {"save_every": 1, "keep_last": 9},
            "parallel": {"offload_optimizer": "none"},
            "log": {"tensorboard": False},
        }
        merged = {key: {**values, **sections.pop(key, {})} for key, values in shared.items()}
        return write_config(self.folder / f"{name}.yaml", run_dir=self.run_dir(name), **merged, **sections)

    def run_dir(self, name: str) -> Path:
        return self.folder / f"run-{name}"

    def start(self, config: Path, *overrides: str, num_ranks: int = 2) -> Ranks:
        """Start the ranks of a job."""
        number = len(list(self.folder.glob("*.log")))
        log = self.folder / f"{number:03d}-{config.stem}.log"
        assert self.server.stdin
        words = [str(config), *overrides]
        self.server.stdin.write(json.dumps({"ranks": num_ranks, "words": words, "log": str(log)}) + "\n")
        self.server.stdin.flush()
        return Ranks(self.server, log)

    def train(self, config: Path, *overrides: str, num_ranks: int = 2) -> str:
        """Run a job to its end; return its log."""
        ranks = self.start(config, *overrides, num_ranks=num_ranks)
        statuses = ranks.wait()
        log = ranks.log.read_text()
        assert statuses == [0] * num_ranks, log
        return log

    def as_stopped(self, name: str, step: int, copy: str) -> Path:
        """Return a copy of a run as it would be, had it ended after the save of a step."""
        run, stopped = self.run_dir(name), self.run_dir(copy)
        stopped.mkdir()
        shutil.copy(run / "metrics.jsonl", stopped)
        shutil.copytree(run / "checkpoints" / folder_name(step), stopped / "checkpoints" / folder_name(step))
        return stopped


@contextmanager
def workshop(folder: Path) -> Iterator[Workshop]:
    """Open a workshop in a folder."""
    clips = draw_clips(5, 64, 64)[:6]
    pack_clips(folder, clips, fps=8.0)
    for variant in VARIANTS:
        make_tiny_pipeline(variant, folder / variant, [clip.caption for clip in clips])
    command = [sys.executable, str(PROGRAM)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield Workshop(folder, server)
        assert server.stdin
        server.stdin.close()


def losses(run_dir: Path) -> dict[int, float]:
    """Return the loss of every step that a run reports, each once."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["loss"] for row in rows}
    assert len(found) == len(rows)
    return found


def checkpoint_of(run_dir: Path, step: int) -> Checkpoint:
    """Return a checkpoint whose files are as written."""
    checkpoint = read_manifest(run_dir / "checkpoints" / folder_name(step))
    assert not checkpoint.problems()
    return checkpoint


def weights_of(checkpoint: Checkpoint, *, average: bool = False) -> dict[str, Tensor]:
    """Return the fp32 weights that were trained, or their running average."""
    found = {}
    for component in checkpoint.components:
        for name, tensor in trained_tensors(checkpoint, component, ema=average).items():
            found[f"{component}/{name}"] = _joined(tensor)
    return found


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return weights, Adam's moments and running averages, whatever number of ranks holds them."""
    found = weights_of(checkpoint)
    for component in checkpoint.components:
        shards = open_shards(checkpoint.folder / component)
        key = "optimizer_state_dict" if shards.stage == 3 else "base_optimizer_state"
        states = [optimizer[key]["state"] for optimizer in shards.optimizers]
        for moment in ("exp_avg", "exp_avg_sq"):
            flats = tuple([state[group][moment] for group in range(len(shards.groups))] for state in states)
            moments = master_weights(dataclasses.replace(shards, flats=flats), frozen=False)
            found |= {f"{component}/{name}|{moment}": _joined(tensor) for name, tensor in moments.items()}
        found[f"{component}|step"] = torch.as_tensor([float(group["step"]) for group in states[0].values()])
        if f"{component}/{average_name(0)}" in checkpoint.files:
            averaged = trained_tensors(checkpoint, component, ema=True)
            found |= {f"{component}/{name}|average": _joined(tensor) for name, tensor in averaged.items()}
    return found


def _joined(tensor: ShardedTensor) -> Tensor:
    return torch.cat(tensor.pieces).detach().reshape(tensor.shape)


def unequal(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names under which two states differ in a bit or one has nothing."""
    missing = set(first) ^ set(second)
    return sorted(missing | {name for name in first if name in second and not torch.equal(first[name], second[name])})
