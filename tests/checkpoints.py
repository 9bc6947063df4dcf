"""Checkpoints in the layout of a ZeRO-3 run, cut over any number of ranks, without a run."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from wan_dist.core.hashing import sha256_of
from wan_dist.io.hashing import write_json_atomic
from wan_dist.io.trust import sign


def write_run(
    run_dir: Path,
    components: Mapping[str, Mapping[str, Tensor]],
    *,
    method: Mapping[str, Any],
    variant: str,
    model_path: Path,
    world_size: int = 2,
    averages: Mapping[str, Mapping[str, Tensor]] | None = None,
    step: int = 7,
) -> Path:
    """Write a run folder with one checkpoint, and return it.

    Args:
        run_dir: folder to make.
        components: component to its trained fp32 tensors.
        method: what the manifest says of the training.
        variant: official name.
        model_path: the pipeline it was trained on.
        world_size: ranks to cut for.
        averages: component to the running averages of its tensors.
        step: optimizer steps done.
    """
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    for component, tensors in components.items():
        average = (averages or {}).get(component)
        write_component(folder / component, tensors, world_size, average)
    (run_dir / "config.yaml").write_text("version: 1\nmodel:\n  path: /secret/place\noptim:\n  lr: 0.001\n")
    (run_dir / "metrics.jsonl").write_text('{"step": 7, "loss": 0.25}\n{"step": 8, "loss": 9.0}\n{"st')
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    state = {
        "variant": variant,
        "model_path": str(model_path.resolve()),
        "data_digest": "d1g3st",
        "seed": 3,
        "global_batch_size": 4,
        "epoch": 1,
        "block": 0,
        "method": dict(method),
    }
    manifest = {
        "version": 2,
        "step": step,
        "world_size": world_size,
        "zero_stage": 3,
        "components": list(components),
        "state": state,
        "files": files,
    }
    write_json_atomic(folder / "manifest.json", sign(manifest))
    return run_dir


def write_component(
    folder: Path, tensors: Mapping[str, Tensor], world_size: int, average: Mapping[str, Tensor] | None
) -> None:
    folder.mkdir(parents=True)
    names = list(tensors)
    groups = [names[: len(names) // 2], names[len(names) // 2 :]]
    shapes = [{name: tensors[name].shape for name in group} for group in groups]
    for rank in range(world_size):
        model = {"module": {}, "buffer_names": [], "param_shapes": shapes, "shared_params": {}}
        torch.save(model, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {
            "zero_stage": 3,
            "partition_count": world_size,
            "fp32_flat_groups": [_part(tensors, group, rank, world_size) for group in groups],
        }
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, path)
        if average is not None:
            parts = {f"group_{i:04d}": _part(average, group, rank, world_size) for i, group in enumerate(groups)}
            save_file(parts, folder / f"ema-{rank:05d}.safetensors")


def _part(tensors: Mapping[str, Tensor], names: list[str], rank: int, world_size: int) -> Tensor:
    """Return a rank's flat share of a group: ceil(n / W) elements of each, the last ones padded."""
    parts = []
    for name in names:
        flat = tensors[name].detach().float().flatten()
        size = math.ceil(flat.numel() / world_size)
        padded = torch.cat([flat, torch.zeros(size * world_size - flat.numel())])
        parts.append(padded[rank * size : (rank + 1) * size])
    return torch.cat(parts).clone()
