"""Reading DeepSpeed ZeRO-3 checkpoint files without DeepSpeed's engine, a GPU or the model.

Layout (deepspeed 0.19.8): every rank's optimizer file holds one flat fp32 tensor per sub-group; the model file names
the parameters of each sub-group in the same order. Of a parameter with n elements every one of W ranks holds
ceil(n / W), the last ones padded; concatenating the ranks' pieces at the same offset gives the parameter back.
Source: `deepspeed/utils/zero_to_fp32.py`, against which the tests compare bit for bit.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_dist.core.errors import CheckpointError


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


def read_master_weights(folder: Path) -> dict[str, ShardedTensor]:
    """Return the fp32 master weights of a ZeRO-3 checkpoint folder by parameter name, nothing loaded yet.

    The files are pickles and run code when read: pass only a folder whose manifest was verified.

    Raises:
        CheckpointError: files are missing or their layout is not the one above.
    """
    model_files = _rank_files(folder, "*_model_states.pt")
    optimizer_files = _rank_files(folder, "*_optim_states.pt")
    if not model_files or len(model_files) != len(optimizer_files):
        raise CheckpointError(
            f"{folder}: has {len(model_files)} model and {len(optimizer_files)} optimizer files; "
            "a ZeRO-3 checkpoint has one of each per rank."
        )
    groups = [_flat_groups(path, len(optimizer_files)) for path in optimizer_files]
    state = _load(model_files[0])
    tensors: dict[str, ShardedTensor] = {}
    for number, shapes in enumerate(state["param_shapes"]):
        tensors |= _split(shapes, [rank_groups[number] for rank_groups in groups], f"{folder}: sub-group {number}")
    for alias, name in state.get("shared_params", {}).items():
        tensors[alias] = tensors[name]
    return tensors


def _rank_files(folder: Path, pattern: str) -> list[Path]:
    def rank_of(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(match.group(1)) if match else 0

    return sorted(folder.glob(pattern), key=rank_of)


def _load(path: Path) -> Any:
    # DeepSpeed's files hold classes of its own, so weights_only cannot be used; mmap keeps memory at what is touched.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _flat_groups(path: Path, world_size: int) -> list[Tensor]:
    state = _load(path)["optimizer_state_dict"]
    stage, partitions = int(state["zero_stage"]), state["partition_count"]
    if stage != 3 or partitions != world_size:
        raise CheckpointError(
            f"{path}: ZeRO stage {stage} in {partitions} partitions; stage 3 in {world_size} was expected."
        )
    return state["fp32_flat_groups"]


def _split(shapes: Mapping[str, torch.Size], flats: Sequence[Tensor], where: str) -> dict[str, ShardedTensor]:
    world_size = len(flats)
    tensors, offset = {}, 0
    for name, shape in shapes.items():
        count = shape.numel()
        part = -(-count // world_size)
        sizes = [max(0, min(part, count - rank * part)) for rank in range(world_size)]
        pieces = tuple(flat[offset : offset + size] for flat, size in zip(flats, sizes, strict=True))
        tensors[name] = ShardedTensor(tuple(shape), flats[0].dtype, pieces)
        offset += part
    if any(flat.numel() != offset for flat in flats):
        raise CheckpointError(f"{where}: {flats[0].numel()} elements per rank, the parameters need {offset}.")
    return tensors
