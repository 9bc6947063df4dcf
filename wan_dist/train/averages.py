"""Running averages of the weights, kept on each rank's own fp32 shards: no communication, no whole model."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_dist.io.repartition import flats_of


class Average(Protocol):
    """Averaged weights of one component."""

    def tensors(self) -> Sequence[Tensor]:
        """Return this rank's averaged flat fp32 tensors, one per group of `flats_of`."""
        ...

    def update(self, step: int) -> None:
        """Take in the weights after the component's optimizer step `step`, from 1."""
        ...


class ExponentialAverage:
    """average <- d * average + (1 - d) * weights after every step, d = min(decay, (1 + step) / (10 + step)).

    The lower d of the first steps forgets the start quickly, as diffusers' and TensorFlow's averages do.
    """

    def __init__(self, engine: Any, decay: float, device: torch.device) -> None:
        """Start from the weights as they are.

        Args:
            engine: DeepSpeed engine, ZeRO stage 1 to 3.
            decay: d of a long run, in [0, 1).
            device: where the average lives.
        """
        self._engine, self._decay = engine, decay
        self._tensors = [shard.detach().to(device, copy=True) for shard in flats_of(engine)]

    def tensors(self) -> Sequence[Tensor]:
        """Return the average; a resume fills it in place."""
        return self._tensors

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the weights."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for average, shard in zip(self._tensors, flats_of(self._engine), strict=True):
            average.lerp_(shard.to(average.device), 1.0 - decay)


class ScheduleFreeAverage:
    """The average that schedule-free AdamW keeps itself: its x, computed from its training point y and its z."""

    def __init__(self, engine: Any) -> None:
        """Remember the engine, whose optimizer has one group."""
        self._engine = engine

    @torch.no_grad()
    def tensors(self) -> Sequence[Tensor]:
        """Return x = y + (1 - 1 / beta1) * (z - y), anew each time; y before the first step."""
        optimizer = self._engine.optimizer.optimizer
        (beta1, _), *_ = [group["betas"] for group in optimizer.param_groups]
        found = []
        for shard in flats_of(self._engine):
            z = optimizer.state.get(shard, {}).get("z")
            found.append(shard.detach().clone() if z is None else torch.lerp(shard.detach(), z, 1.0 - 1.0 / beta1))
        return found

    def update(self, step: int) -> None:
        """Nothing: the optimizer's own step does it."""


class AverageTensors(Mapping[str, Sequence[Tensor]]):
    """Averaged flat tensors by component, for checkpoints; computed when asked for."""

    def __init__(self, averages: Mapping[str, Average]) -> None:
        """Wrap averages by component."""
        self._averages = averages

    def __getitem__(self, component: str) -> Sequence[Tensor]:
        """Return a component's tensors."""
        return self._averages[component].tensors()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the components."""
        return iter(self._averages)

    def __len__(self) -> int:
        """Return the number of components."""
        return len(self._averages)


@contextlib.contextmanager
@torch.no_grad()
def averaged_weights(engines: Mapping[str, Any], averages: Mapping[str, Average]) -> Iterator[None]:
    """Compute with averaged weights inside of the context; collective. Afterwards all is bit for bit as before."""
    kept: dict[str, list[Tensor]] = {}
    for component, average in averages.items():
        shards = flats_of(engines[component])
        tensors = average.tensors()  # before the shards change, from which some averages are computed
        kept[component] = [shard.clone() for shard in shards]
        for shard, tensor in zip(shards, tensors, strict=True):
            shard.copy_(tensor)
        _publish(engines[component])
    try:
        yield
    finally:
        for component, tensors in kept.items():
            for shard, tensor in zip(flats_of(engines[component]), tensors, strict=True):
                shard.copy_(tensor)
            _publish(engines[component])


def _publish(engine: Any) -> None:
    """Copy the fp32 shards to the weights that the forward pass reads, as DeepSpeed's step does; collective."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    for number in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(number)
    if optimizer.persistent_parameters:  # small ones, which stay gathered on every rank
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()
