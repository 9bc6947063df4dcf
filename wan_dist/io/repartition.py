"""Shards of one number of ranks as another number of ranks would have written them.

DeepSpeed's own way is a universal checkpoint: a copy of all state with one file per parameter and moment, after which
every parameter group carries the first group's hyperparameters and only Adam's two moments survive (0.19.8). The
layout is known to the element, so each rank instead reads its new elements from the memory-mapped old files and hands
them to DeepSpeed as if they were its own file: no copy on disk, no second format, groups and moments as they were.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wan_dist.core.errors import CheckpointError
from wan_dist.io.checkpoint import average_name
from wan_dist.io.zero_layout import Group, Segment, partition_each, partition_whole, pieces_of
from wan_dist.io.zero_shards import Shards

_SCALERS = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")


def layout_of(engine: Any, world_size: int) -> tuple[Group, ...]:
    """Return where the parameters of a live engine lie in its ranks' flat tensors.

    Args:
        engine: a DeepSpeed engine with ZeRO-1, 2 or 3.
        world_size: its number of ranks.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return tuple(
            partition_each({engine.param_names[p]: p.ds_numel for p in group}, world_size)
            for group in optimizer.fp16_groups
        )
    whole = hasattr(optimizer, "round_robin_bit16_groups")
    groups = optimizer.round_robin_bit16_groups if whole else optimizer.bf16_groups
    paddings = optimizer.round_robin_bit16_padding if whole else [[0] * len(group) for group in groups]
    return tuple(
        partition_whole({engine.param_names[p]: p.numel() for p in group}, padding, [flat.numel()] * world_size)
        for group, padding, flat in zip(groups, paddings, flats_of(engine), strict=True)
    )


def flats_of(engine: Any) -> list[Tensor]:
    """Return this rank's live fp32 master weights, one flat tensor per group."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__}: not a ZeRO optimizer that is known here")


class Repartitioned:
    """A checkpoint engine whose files are cut anew for this rank."""

    def __init__(self, shards: Shards, engine: Any, rank: int, world_size: int) -> None:
        """Compute nothing yet.

        Args:
            shards: what another number of ranks wrote, of the engine's ZeRO stage.
            engine: the live engine.
            rank: this rank.
            world_size: number of ranks now.

        Raises:
            CheckpointError: the engine trains other parameters than were saved.
        """
        self._shards, self._engine, self._rank, self._world_size = shards, engine, rank, world_size
        self._groups = layout_of(engine, world_size)
        self._pieces = pieces_of(shards.groups)
        now = {segment.name for group in self._groups for segments in group.segments for segment in segments}
        if missing := sorted(now ^ set(self._pieces)):
            raise CheckpointError(f"{shards.folder}: trains other parameters than this run, such as {missing[0]}.")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return what this rank's file would hold."""
        if path.endswith("_model_states.pt"):
            model = {**self._shards.models[0], "dp_world_size": self._world_size}
            if self._shards.stage == 3 and model.get("frozen_param_fragments"):
                model["frozen_param_fragments"] = self._frozen(model["frozen_param_shapes"])
            return model
        return {"optimizer_state_dict": self._optimizer_state()}

    def average(self, folder: Path) -> list[Tensor]:
        """Return this rank's averaged weights, one flat tensor per group, from the files of the old ranks."""
        sources = [safe_open(folder / average_name(rank), framework="pt") for rank in range(self._shards.world_size)]
        flats = [
            [handle.get_tensor(f"group_{number:04d}") for number in range(len(self._shards.groups))]
            for handle in sources
        ]
        return [self._fill(number, flats, torch.float32) for number in range(len(self._groups))]

    def _frozen(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return this rank's fragments of the weights that are not trained."""
        fragments = {}
        for name, shape in shapes.items():
            old, new = (
                partition_each({name: torch.Size(shape).numel()}, ranks)
                for ranks in (self._shards.world_size, self._world_size)
            )
            held = [model["frozen_param_fragments"][name] for model in self._shards.models]
            (wanted,) = new.segments[self._rank]
            fragments[name] = torch.zeros(new.sizes[self._rank], dtype=held[0].dtype)
            for segments, fragment in zip(old.segments, held, strict=True):
                _copy_overlap(fragments[name], wanted, fragment, segments[0])
        return fragments

    def _optimizer_state(self) -> dict[str, Any]:
        live = dict(self._engine.optimizer.state_dict())
        old = self._shards.optimizers[0]
        live |= {key: old[key] for key in _SCALERS if key in old and key in live}
        masters = [self._fill(number, self._shards.flats, torch.float32) for number in range(len(self._groups))]
        base = {"state": self._moments(), "param_groups": self._param_groups()}
        if self._shards.stage == 3:
            return {**live, "fp32_flat_groups": masters, "optimizer_state_dict": base}
        return {**live, "single_partition_of_fp32_groups": masters, "base_optimizer_state": base}

    def _base_states(self) -> list[Mapping[str, Any]]:
        key = "optimizer_state_dict" if self._shards.stage == 3 else "base_optimizer_state"
        return [state[key] for state in self._shards.optimizers]

    def _param_groups(self) -> list[dict[str, Any]]:
        """Return the old hyperparameters group by group, naming the new flat tensors."""
        live = self._engine.optimizer.param_groups
        old = self._base_states()[0]["param_groups"]
        if len(live) != len(old):
            raise CheckpointError(f"{self._shards.folder}: has {len(old)} parameter groups, this run has {len(live)}.")
        if self._shards.stage == 3:
            owners = self._engine.optimizer.sub_group_to_group_id
            held = [[sub for sub in range(len(self._groups)) if owners[sub] == number] for number in range(len(old))]
        else:
            held = [[number] for number in range(len(old))]
        return [{**group, "params": ids} for group, ids in zip(old, held, strict=True)]

    def _moments(self) -> dict[int, dict[str, Any]]:
        """Return the optimizer's state of each new flat tensor: element by element, and scalars as they were."""
        states = [base["state"] for base in self._base_states()]
        if not states[0]:
            return {}
        return {number: self._moments_of(number, states) for number in range(len(self._groups))}

    def _moments_of(self, number: int, states: Sequence[Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
        # Old groups that parts of the new one come from; their scalars must agree.
        sources = sorted({piece[0] for name in self._names(number) for piece in self._pieces[name]})
        if any(source not in states[0] for source in sources):
            return {}
        moments: dict[str, Any] = {}
        for key, example in states[0][sources[0]].items():
            if isinstance(example, Tensor) and example.dim() > 0:
                flats: list[list[Any]] = [
                    [state[group].get(key) for group in range(len(self._shards.groups))] for state in states
                ]
                self._check_elementwise(key, flats, sources)
                moments[key] = self._fill(number, flats, example.dtype)
                continue
            if any(not _equal(states[0][source].get(key), example) for source in sources):
                raise CheckpointError(
                    f"{self._shards.folder}: the optimizer's {key} differs between parameter groups that another "
                    f"number of ranks would merge; continue with {self._shards.world_size} ranks."
                )
            moments[key] = example
        return moments

    def _check_elementwise(self, key: str, flats: Sequence[Sequence[Tensor]], sources: Sequence[int]) -> None:
        for rank, tensors in enumerate(flats):
            for group in sources:
                size = self._shards.flats[rank][group].numel()
                if not isinstance(tensors[group], Tensor) or tensors[group].dim() != 1 or tensors[group].numel() < size:
                    raise CheckpointError(
                        f"{self._shards.folder}: the optimizer's {key} does not go element by element, so it cannot be "
                        f"cut anew; continue with {self._shards.world_size} ranks."
                    )

    def _names(self, number: int) -> list[str]:
        return [s.name for segments in self._groups[number].segments for s in segments]

    def _fill(self, number: int, flats: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
        """Return this rank's flat tensor of a new group, gathered from [rank][group] old ones; padding is zero."""
        group = self._groups[number]
        target = torch.zeros(group.sizes[self._rank], dtype=dtype)
        for segment in group.segments[self._rank]:
            for old_group, old_rank, piece in self._pieces[segment.name]:
                _copy_overlap(target, segment, flats[old_rank][old_group], piece)
        return target


def _copy_overlap(target: Tensor, wanted: Segment, source: Tensor, piece: Segment) -> None:
    start = max(wanted.start, piece.start)
    stop = min(wanted.start + wanted.count, piece.start + piece.count)
    if start < stop:
        there, here = wanted.offset + start - wanted.start, piece.offset + start - piece.start
        target[there : there + stop - start] = source[here : here + stop - start]


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def reading_through(real: Any, source: Repartitioned) -> Any:
    """Return a checkpoint engine that reads from `source` and is the real one in everything else."""
    return SimpleNamespace(load=source.load, **{name: getattr(real, name) for name in _methods(real)})


def _methods(real: Any) -> list[str]:
    return [name for name in dir(real) if not name.startswith("__") and name != "load"]
