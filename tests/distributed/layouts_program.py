"""Saves every layout on two ranks, and resumes each on one, two and three; driven by `test_zero_layouts.py`.

Usage: layouts_program.py OUT
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.distributed import engines
from wan_dist.core.errors import CheckpointError
from wan_dist.io.checkpoint import read_manifest
from wan_dist.io.component_weights import trained_tensors
from wan_dist.io.repartition import flats_of
from wan_dist.io.restoring import restore, restore_averages
from wan_dist.io.saving import Saver
from wan_dist.io.zero_shards import read_master_weights

# name: (stage, dtype, frozen, frozen excluded, optimizer)
CASES: dict[str, tuple[int, str, bool, bool, str]] = {
    "zero3": (3, "bf16", False, False, "adamw"),
    "zero3-lora": (3, "bf16", True, True, "adamw"),
    "zero3-frozen": (3, "bf16", True, False, "adamw"),
    "zero2": (2, "bf16", True, False, "adamw"),
    "zero1": (1, "bf16", True, True, "adamw"),
    "zero1-fp32": (1, "fp32", False, False, "adamw"),
    "zero0": (0, "fp32", False, False, "adamw"),
    "zero3-sgd": (3, "fp32", False, False, "sgd"),
    "zero3-factored": (3, "fp32", False, False, "factored"),
}
AVERAGED = ("zero3", "zero2")  # their averages are half of the weights
STEPS = range(3)
MORE = range(3, 5)


def built(name: str, *, seed: int, **changes: Any) -> Any:
    stage, dtype, frozen, _, optimizer = CASES[name]
    return engines.build(engines.settings(stage, dtype=dtype, **changes), seed=seed, frozen=frozen, optimizer=optimizer)


def average(engine: Any) -> list[torch.Tensor]:
    return [flat.detach().clone() * 0.5 for flat in flats_of(engine)]


def save(out: Path, rank: int) -> None:
    """Train every case, save it, and leave beside it what the live engine held and what it did next."""
    for name, (stage, _, _, excluded, _) in CASES.items():
        engine = built(name, seed=1)
        engines.train(engine, STEPS)
        saver = Saver(out / name, torch.device("cpu"), asynchronous=name != "zero2", keep_last=1)
        ema = {"transformer": average(engine)} if name in AVERAGED else None
        saver.start({"transformer": engine}, 3, {"epoch": 0}, zero_stage=stage, exclude_frozen=excluded, ema=ema)
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.problem is None, outcome.problem
        saver.close()
        state = engines.full_state(engine)
        losses = engines.train(engine, MORE)
        if rank == 0:
            save_file(state, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(losses))
            if stage:
                export(out, name)


def export(out: Path, name: str) -> None:
    """Leave our reading and DeepSpeed's own export, where that can read it."""
    folder = out / name / "step-00000003"
    ours = read_master_weights(folder / "transformer")
    joined = {n: torch.cat([p.clone() for p in t.pieces]).reshape(t.shape) for n, t in ours.items()}
    save_file(joined, out / f"{name}.ours.safetensors")
    if name in AVERAGED:
        averaged = trained_tensors(read_manifest(folder), "transformer", ema=True)
        for key, tensor in averaged.items():
            assert torch.equal(torch.cat([p.clone() for p in tensor.pieces]).reshape(tensor.shape), joined[key] * 0.5)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.suppress(ValueError), contextlib.redirect_stdout(io.StringIO()):
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="transformer")
        assert theirs is not None
        save_file({n: t.clone().contiguous() for n, t in theirs.items()}, out / f"{name}.theirs.safetensors")


def resume(out: Path, rank: int, world_size: int) -> None:
    """Resume every case; with other sub-groups and offloading too; compare with what was live."""
    for name, (stage, _, _, excluded, _) in CASES.items():
        checkpoint = read_manifest(out / name / "step-00000003")
        saved = load_file(out / f"{name}.safetensors")
        variants: list[dict[str, Any]] = [{}, {"sub_group": 500, "offload": True}] if name == "zero3" else [{}]
        for changes in variants:
            engine = built(name, seed=99, **changes)
            if CASES[name][3]:
                _copy_base(engine, built(name, seed=1))
            ema = [torch.zeros_like(flat) for flat in flats_of(engine)] if name in AVERAGED else []
            parts = {"transformer": engine}
            if name == "zero3-factored" and world_size != 2:
                with pytest.raises(CheckpointError, match="does not go element by element"):
                    restore(parts, checkpoint, exclude_frozen=excluded)
                continue
            restore(parts, checkpoint, exclude_frozen=excluded)
            absent = restore_averages(parts, checkpoint, {"transformer": ema or flats_of(engine)} if stage else {})
            assert absent == ([] if ema or not stage else ["transformer"])
            state = engines.full_state(engine)
            assert set(state) == set(saved), (name, set(state) ^ set(saved))
            for key, value in state.items():
                assert torch.equal(value, saved[key]), (name, key, value, saved[key])
            groups = [(g["lr"], g["weight_decay"]) for g in engine.optimizer.param_groups]
            assert groups == [(1e-2, 0.1), (3e-3, 0.0)], groups
            if ema:
                for average, flat in zip(ema, flats_of(engine), strict=True):
                    # Padding may hold anything, also NaN.
                    assert torch.allclose(average, flat.detach() * 0.5, rtol=0, atol=0, equal_nan=True), name
            losses = engines.train(engine, MORE)
            if rank == 0:
                with (out / f"{name}.resumed-{world_size}.jsonl").open("a") as handle:
                    handle.write(json.dumps(losses) + "\n")


def _copy_base(engine: Any, other: Any) -> None:
    """Give a fresh engine the frozen weights that the run began with, as a base model does."""

    names = dict(other.module.named_parameters())
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            both = [parameter, names[name]]
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters(both, modifier_rank=0):
                    parameter.data.copy_(names[name].data)
            else:
                parameter.data.copy_(names[name].data)


def job(num_ranks: int, work: Callable[[int], None], out: Path, name: str) -> None:
    """Run a job of forked ranks to its end."""
    pids = engines.fork_ranks(num_ranks, work, out / f"{name}.store", str(out / name))
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    logs = [(out / f"{name}.rank-{rank}.log").read_text() for rank in range(num_ranks)]
    assert statuses == [0] * num_ranks, "\n".join(logs)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    job(2, lambda rank: save(out, rank), out, "save")
    for num_ranks in (1, 2, 3):
        job(num_ranks, lambda rank, count=num_ranks: resume(out, rank, count), out, f"resume-{num_ranks}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
