"""Checkpoints back into engines: the same ranks through DeepSpeed's own loading, another number of them cut anew."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from wan_dist.core.errors import CheckpointError
from wan_dist.io import random_state
from wan_dist.io.checkpoint import Checkpoint, average_name
from wan_dist.io.repartition import Repartitioned, layout_of, reading_through
from wan_dist.io.zero_layout import Group
from wan_dist.io.zero_shards import open_shards

logger = logging.getLogger(__name__)

# What the configuration owns: a resumed run takes them from there, group by group, and the rest as it was saved.
_CONFIGURED = ("lr", "initial_lr", "weight_decay", "betas", "eps")


def restore(
    engines: Mapping[str, Any],
    checkpoint: Checkpoint,
    *,
    exclude_frozen: bool,
) -> None:
    """Load weights, optimizer state and this rank's random state; collective.

    The number of ranks, offloading and DeepSpeed's sub-group size may differ from those that wrote it.

    Args:
        engines: the DeepSpeed engine of each component, fresh.
        checkpoint: what to continue from, verified and trusted.
        exclude_frozen: whether it was saved without frozen weights, which then keep what the engines hold.

    Raises:
        CheckpointError: another ZeRO stage or other parameters, or DeepSpeed could not load it.
    """
    for component, engine in engines.items():
        if engine.zero_optimization_stage() != checkpoint.zero_stage:
            raise CheckpointError(
                f"{checkpoint.folder}: was saved with ZeRO stage {checkpoint.zero_stage}, this run has "
                f"{engine.zero_optimization_stage()}; restore it, or choose another run_dir."
            )
        configured = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
        source = _repartitioned(engine, checkpoint, component)
        _load(engine, checkpoint.folder, component, strict=not exclude_frozen, source=source)
        _reapply(engine, configured)
    random_state.restore(checkpoint.folder, dist.get_rank())


def restore_averages(
    engines: Mapping[str, Any], checkpoint: Checkpoint, averages: Mapping[str, Sequence[Tensor]]
) -> list[str]:
    """Fill this rank's running averages in place, and return the components of which the checkpoint holds none.

    Args:
        engines: the DeepSpeed engine of each component.
        checkpoint: what was restored.
        averages: flat tensors by component, one per group of the engine's optimizer.
    """
    absent = []
    for component, targets in averages.items():
        if f"{component}/{average_name(0)}" not in checkpoint.files:
            absent.append(component)
            continue
        source = _repartitioned(engines[component], checkpoint, component)
        _restore_average(targets, checkpoint.folder / component, source)
    return absent


def _repartitioned(engine: Any, checkpoint: Checkpoint, component: str) -> Repartitioned | None:
    """Return the shards cut anew if this job lays its state out in another way; collective in its answer."""
    if checkpoint.zero_stage == 0:
        return None  # every rank holds everything
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shards = open_shards(checkpoint.folder / component)
    if shards.world_size == world_size:
        old, new = (
            [_names_and_size(g, rank) for g in groups] for groups in (shards.groups, layout_of(engine, world_size))
        )
        # Below stage 3 DeepSpeed saves without padding and pads itself.
        if old == new or (checkpoint.zero_stage < 3 and [o[0] for o in old] == [n[0] for n in new]):
            return None
    if rank == 0:
        logger.info("%s: cutting the shards of %d ranks anew for %d", component, shards.world_size, world_size)
    return Repartitioned(shards, engine, rank, world_size)


def _names_and_size(group: Group, rank: int) -> tuple[list[str], int]:
    return [segment.name for segment in group.segments[rank]], group.sizes[rank]


def _load(engine: Any, folder: Path, component: str, *, strict: bool, source: Repartitioned | None) -> None:
    real = engine.checkpoint_engine
    if source:
        engine.checkpoint_engine = reading_through(real, source)
        # DeepSpeed looks for a model file of this very rank, which a smaller job has not written.
        first = sorted((folder / component).glob("*_model_states.pt"))[:1]
        engine._get_all_ckpt_names = lambda load_dir, tag: [str(path) for path in first]
    try:
        # Always an explicit tag and always the optimizer: DeepSpeed's partial modes load nothing under ZeRO-3 (0.19.8).
        path, _ = engine.load_checkpoint(str(folder), tag=component, load_module_strict=strict)
    finally:
        engine.checkpoint_engine = real
        if source:
            del engine._get_all_ckpt_names
    if path is None:
        raise CheckpointError(f"{folder / component}: DeepSpeed loaded nothing from it.")


def _reapply(engine: Any, configured: Sequence[Mapping[str, Any]]) -> None:
    for group, fresh in zip(engine.optimizer.param_groups, configured, strict=True):
        for key, value in fresh.items():
            if key in _CONFIGURED or key not in group:
                group[key] = value
    if type(engine.basic_optimizer).__name__ == "DeepSpeedCPUAdam":
        # It counts steps in a Python number, torch's AdamW in a tensor; offloading may have changed in between.
        for state in engine.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = int(state["step"].item())


def _restore_average(targets: Sequence[Tensor], folder: Path, source: Repartitioned | None) -> None:
    if source:
        flats = source.average(folder)
    else:
        saved = load_file(folder / average_name(dist.get_rank()))
        flats = [saved[f"group_{number:04d}"] for number in range(len(saved))]
    for target, flat in zip(targets, flats, strict=True):
        target.copy_(flat)
