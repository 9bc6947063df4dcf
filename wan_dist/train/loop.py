"""The training loop: one step, and the steps of a run."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_dist.core.order import Block
from wan_dist.data.batching import Batch
from wan_dist.train.objective import Objective


@dataclass
class TrainState:
    """Where a run stands; with the seed it determines everything that follows.

    Attributes:
        step: optimizer steps done.
        epoch: epoch of the sample order.
        block: blocks of that epoch that training has consumed.
    """

    step: int = 0
    epoch: int = 0
    block: int = 0


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        loss: mean over this rank's micro-batches, a scalar on the device; reading it waits for the device.
        lr: learning rate used.
        keys: clips this rank trained on.
        data_wait_s: seconds that this rank waited for batches.
        step_s: seconds of the whole step.
    """

    loss: Tensor
    lr: float
    keys: tuple[str, ...]
    data_wait_s: float
    step_s: float


class Batches(Protocol):
    """Where batches come from."""

    def steps(self, epoch: int, block: int) -> Iterator[tuple[Block, Iterator[Batch]]]:
        """Yield, endlessly from a state, each block with this rank's micro-batches of it."""
        ...


class Hook(Protocol):
    """Something done after every step, by all ranks in the same order."""

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Act on a finished step; `state` already counts it."""
        ...


def train_step(engine: Any, objective: Objective, batches: Iterable[Batch]) -> tuple[Tensor, tuple[str, ...], float]:
    """Run one optimizer step: every micro-batch forward and backward, gradients accumulated, one update.

    Returns:
        Mean loss of the micro-batches (scalar on the device), their clip keys, seconds spent waiting for them.
    """
    losses: list[Tensor] = []
    keys: list[str] = []
    waited_s = 0.0
    clock = time.perf_counter()
    for batch in batches:
        waited_s += time.perf_counter() - clock
        loss = objective.loss(engine, batch).loss
        engine.backward(loss)
        engine.step()  # updates on the last micro-batch only
        losses.append(loss.detach())
        keys.extend(batch.keys)
        clock = time.perf_counter()
    return torch.stack(losses).mean(), tuple(keys), waited_s


def train(
    engine: Any,
    objective: Objective,
    batches: Batches,
    state: TrainState,
    *,
    num_steps: int,
    lr_at: Callable[[int], float],
    hooks: Sequence[Hook],
    should_stop: Callable[[], bool],
) -> None:
    """Train from `state` until `num_steps` optimizer steps are done or the ranks agree to stop.

    Args:
        engine: DeepSpeed engine around the transformer.
        objective: what is minimised.
        batches: this rank's data.
        state: advanced in place.
        num_steps: optimizer steps of the whole run.
        lr_at: learning rate of a step.
        hooks: called in this order after every step.
        should_stop: asked after every step; collective, the same answer on every rank.
    """
    if state.step >= num_steps:
        return
    for block, micro_batches in batches.steps(state.epoch, state.block):
        started = time.perf_counter()
        lr = lr_at(state.step)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        loss, keys, waited_s = train_step(engine, objective, micro_batches)
        state.step += 1
        state.epoch, state.block = block.epoch, block.block + 1
        result = StepResult(loss, lr, keys, waited_s, time.perf_counter() - started)
        for hook in hooks:
            hook.after_step(state, result)
        if state.step >= num_steps or should_stop():
            return
