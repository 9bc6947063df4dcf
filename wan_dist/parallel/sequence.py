"""Sequence parallelism: neighbouring ranks share a sample's tokens, by diffusers' Ulysses attention.

Every rank of a group gets the same batch, keeps its part of the tokens through the blocks, and exchanges parts for
heads around self-attention (arXiv:2309.14509). The prediction is gathered, so that every rank of a group has the whole
loss, and backpropagates its own tokens' part of it: the group's gradients must be summed. DeepSpeed averages over all
ranks, which leaves a factor of 1 / group size; the caller multiplies the loss by `Ranks.sequence_size`.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from wan_dist.core.errors import ConfigError
from wan_dist.parallel.dist import Ranks

logger = logging.getLogger(__name__)


def check_heads(num_heads: int, sequence_size: int) -> None:
    """Return if a group of ranks can share the attention heads.

    Raises:
        ConfigError: they do not divide.
    """
    if num_heads % sequence_size:
        legal = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ConfigError(
            f"parallel.sequence_parallel = {sequence_size} does not divide the transformer's {num_heads} attention "
            f"heads; use one of {', '.join(map(str, legal))}."
        )


def share_tokens(model: Any, ranks: Ranks) -> None:
    """Make the ranks of each sequence group compute a diffusers transformer together; collective.

    Args:
        model: a `WanTransformer3DModel`, its attention backend chosen.
        ranks: this process's place.
    """
    from diffusers import ContextParallelConfig

    size, rank = ranks.sequence_size, ranks.rank % ranks.sequence_size
    inner, patch = model.forward, model.config.patch_size

    def forward(hidden_states: torch.Tensor, timestep: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        if options.get("first_timestep") is not None:
            grid = zip(hidden_states.shape[2:], patch, strict=True)
            options["first_token"] = rank * math.prod(length // p for length, p in grid) // size
        if timestep.ndim == 2:  # one per token, as diffusers' pipelines give ti2v-5B
            timestep = timestep.chunk(size, dim=1)[rank]
        return inner(hidden_states, timestep, *inputs, **options)

    model.forward = forward
    # Without the entry for the whole model, which splits timesteps and fails where there is one per sample.
    plan = {name: entry for name, entry in model._cp_plan.items() if name}
    mesh = _mesh(ranks.world_size, size, ranks.device.type)
    with _counted_devices():
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size, mesh=mesh), cp_plan=plan)


@functools.lru_cache(maxsize=1)
def _mesh(world_size: int, sequence_size: int, device_type: str) -> DeviceMesh:
    # Neighbours share a sequence: within one machine the exchange is fastest.
    shape = (world_size // sequence_size, 1, sequence_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "ring", "ulysses"))


@contextlib.contextmanager
def _counted_devices() -> Iterator[None]:
    """Let diffusers number devices where there is no accelerator: it divides by their count (0.42.1)."""
    if torch.accelerator.device_count():
        yield
        return
    counted = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        torch.accelerator.device_count = counted
