"""Reading the DeepSpeed shards of a component without DeepSpeed's engine, a GPU or the model.

Every rank's optimizer file holds flat fp32 tensors (`zero_layout` says where what lies); the model file names the
parameters of each group in the same order. Frozen weights, where they were saved, are fragments of the compute dtype.
ZeRO-0 keeps everything in rank 0's model file. The tests compare every stage with DeepSpeed's own `zero_to_fp32`,
bit for bit.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_dist.core.errors import CheckpointError
from wan_dist.io.pickles import load_shard
from wan_dist.io.zero_layout import Group, partition_each, partition_whole, pieces_of


@dataclass(frozen=True)
class ShardedTensor:
    """One full tensor as the pieces that lie in the ranks' files.

    Attributes:
        shape: shape of the full tensor.
        dtype: dtype of the pieces.
        pieces: 1-D views of memory-mapped files; their concatenation is the flat tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Tensor, ...]


@dataclass(frozen=True)
class Shards:
    """The files of a component, opened and not yet read.

    Attributes:
        folder: where they lie.
        stage: ZeRO stage that wrote them.
        models: what each model file holds; a single one below stage 3.
        optimizers: the `optimizer_state_dict` of each rank's file; empty for stage 0.
        shapes: shape of every trained parameter, by group.
        groups: where the trained parameters lie.
        flats: [rank][group] flat fp32 master weights.
    """

    folder: Path
    stage: int
    models: tuple[Mapping[str, Any], ...]
    optimizers: tuple[Mapping[str, Any], ...]
    shapes: tuple[Mapping[str, torch.Size], ...]
    groups: tuple[Group, ...]
    flats: tuple[Sequence[Tensor], ...]

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote them."""
        return len(self.flats)


def open_shards(folder: Path) -> Shards:
    """Return the shards of a component's folder; its files are pickles, so its checkpoint must be trusted.

    Raises:
        CheckpointError: files are missing, or their layout is not one that DeepSpeed 0.19 writes.
    """
    models = tuple(load_shard(path) for path in _rank_files(folder, "*_model_states.pt"))
    paths = _rank_files(folder, "*_optim_states.pt")
    if not models:
        raise CheckpointError(f"{folder}: has no *_model_states.pt; DeepSpeed writes at least one.")
    if not paths:
        return _unsharded(folder, models[0])
    optimizers = tuple(load_shard(path)["optimizer_state_dict"] for path in paths)
    # DeepSpeed's optimizer for bf16 with fp32 accumulation under ZeRO-1 does not name its stage.
    stage = int(optimizers[0].get("zero_stage", 1))
    partitions = optimizers[0].get("partition_count")
    count = max(partitions) if isinstance(partitions, list) else partitions
    if count != len(paths) or (stage == 3 and len(models) != count):
        raise CheckpointError(
            f"{folder}: has {len(models)} model and {len(paths)} optimizer files, but {count} ranks wrote it."
        )
    shapes = tuple(models[0]["param_shapes"])
    if stage == 3:
        flats = tuple(state["fp32_flat_groups"] for state in optimizers)
        groups = tuple(partition_each(_counts(group), len(paths)) for group in shapes)
    else:
        flats = tuple(state["single_partition_of_fp32_groups"] for state in optimizers)
        paddings = optimizers[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        groups = tuple(
            partition_whole(_counts(group), paddings[number], [rank_flats[number].numel() for rank_flats in flats])
            for number, group in enumerate(shapes)
        )
    shards = Shards(folder, stage, models, optimizers, shapes, groups, flats)
    _check_complete(shards)
    return shards


def read_master_weights(folder: Path, *, frozen: bool = True) -> dict[str, ShardedTensor]:
    """Return the fp32 master weights of a component's folder by parameter name, nothing loaded yet.

    Args:
        folder: `step-00000100/transformer`, of a checkpoint that is trusted and verified.
        frozen: with the weights that were not trained, if they were saved, and the buffers.

    Raises:
        CheckpointError: files are missing or their layout is unknown.
    """
    return master_weights(open_shards(folder), frozen=frozen)


def master_weights(shards: Shards, *, frozen: bool = True) -> dict[str, ShardedTensor]:
    """Return the fp32 master weights of opened shards, as `read_master_weights` does."""
    tensors = _frozen(shards) if frozen else {}
    pieces = pieces_of(shards.groups)
    for shapes in shards.shapes:
        for name, shape in shapes.items():
            views = tuple(
                shards.flats[rank][group][segment.offset : segment.offset + segment.count]
                for group, rank, segment in pieces[name]
            )
            tensors[name] = ShardedTensor(tuple(shape), torch.float32, views)
    for alias, name in (shards.models[0].get("shared_params") or {}).items():
        if name in tensors:
            tensors[alias] = tensors[name]
    return tensors


def _rank_files(folder: Path, pattern: str) -> list[Path]:
    def rank_of(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(match.group(1)) if match else 0

    return sorted(folder.glob(pattern), key=rank_of)


def _counts(shapes: Mapping[str, torch.Size]) -> dict[str, int]:
    return {name: torch.Size(shape).numel() for name, shape in shapes.items()}


def _unsharded(folder: Path, model: Mapping[str, Any]) -> Shards:
    """Return a ZeRO-0 component as one rank that holds each parameter as a group of its own."""
    if model.get("optimizer") is None:
        raise CheckpointError(f"{folder}: has no *_optim_states.pt, and its model file no optimizer state.")
    buffers = set(model["buffer_names"])
    weights = {name: value for name, value in model["module"].items() if name not in buffers}
    shapes = tuple({name: value.shape} for name, value in weights.items())
    groups = tuple(partition_each(_counts(group), 1) for group in shapes)
    flats = ([value.detach().reshape(-1).float() for value in weights.values()],)
    return Shards(folder, 0, (model,), (), shapes, groups, flats)


def _frozen(shards: Shards) -> dict[str, ShardedTensor]:
    """Return buffers and what the optimizer does not own."""
    model = shards.models[0]
    buffers = set(model["buffer_names"])
    tensors = {
        name: _whole(value.float() if value.is_floating_point() else value)
        for name, value in model["module"].items()
        if name in buffers
    }
    shapes = model.get("frozen_param_shapes") or {}
    for name, shape in shapes.items():
        fragments = [m["frozen_param_fragments"][name] for m in shards.models]
        if shards.stage < 3:
            tensors[name] = _whole(fragments[0])
            continue
        group = partition_each({name: torch.Size(shape).numel()}, shards.world_size)
        pieces = [f[s[0].offset : s[0].offset + s[0].count] for f, s in zip(fragments, group.segments, strict=True)]
        tensors[name] = ShardedTensor(tuple(shape), fragments[0].dtype, tuple(pieces))
    if shards.stage == 1:
        # ZeRO-1 saves no fragments; what is frozen stands whole in the module's own state.
        trained = {name for group in shards.shapes for name in group}
        for name, value in model["module"].items():
            if name not in trained and name not in buffers:
                tensors[name] = _whole(value)
    return tensors


def _whole(value: Tensor) -> ShardedTensor:
    flat = value.detach().reshape(-1)
    return ShardedTensor(tuple(value.shape), flat.dtype, (flat,))


def _check_complete(shards: Shards) -> None:
    for number, (shapes, group) in enumerate(zip(shards.shapes, shards.groups, strict=True)):
        where = f"{shards.folder}: group {number}"
        for rank, flats in enumerate(shards.flats):
            if flats[number].numel() != group.sizes[rank]:
                raise CheckpointError(
                    f"{where}: rank {rank} has {flats[number].numel()} elements, {group.sizes[rank]} were expected."
                )
        held = sum(segment.count for segments in group.segments for segment in segments)
        if held != sum(_counts(shapes).values()):
            raise CheckpointError(f"{where}: the ranks hold {held} elements, its parameters need more.")
