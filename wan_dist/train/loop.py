"""The training loop: one step, and the steps of a run."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from wan_dist.core.order import Block
from wan_dist.data.batching import Batch
from wan_dist.train.experts import Expert
from wan_dist.train.optimizers import set_learning_rate


@dataclass
class TrainState:
    """Where a run stands; with the seed it determines everything that follows.

    Attributes:
        step: optimizer steps done, over all experts, skipped ones included.
        epoch: epoch of the sample order.
        block: blocks of that epoch that training has consumed.
        component_steps: of those, the steps of each component.
    """

    step: int = 0
    epoch: int = 0
    block: int = 0
    component_steps: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave.

    Attributes:
        expert: the noise range it was for.
        component: what was trained.
        loss: mean over this rank's micro-batches, a scalar on the device; reading it waits for the device.
        sample_losses: [B] fp32 on the device, each sample's own loss; B is this rank's samples of the step.
        sigma: [B] fp32 on the device, their noise levels.
        grad_norm: global norm before clipping, a number or a scalar on the device; infinite for a skipped step.
        lr: learning rate used.
        keys: clips this rank trained on.
        num_tokens: transformer tokens of this rank's samples.
        data_wait_s: seconds that this rank waited for batches.
        step_s: seconds of the whole step.
        skipped: a gradient was not finite on some rank, so that nothing was updated.
    """

    expert: str
    component: str
    loss: Tensor
    sample_losses: Tensor
    sigma: Tensor
    grad_norm: Any
    lr: float
    keys: tuple[str, ...]
    num_tokens: int
    data_wait_s: float
    step_s: float
    skipped: bool


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


def train_step(expert: Expert, batches: Iterable[Batch], *, lr: float) -> StepResult:
    """Run one optimizer step: every micro-batch forward and backward, gradients accumulated, one update.

    Args:
        expert: what is trained.
        batches: this rank's micro-batches.
        lr: learning rate.
    """
    started = clock = time.perf_counter()
    engine = expert.engine
    set_learning_rate(engine.optimizer, lr)
    losses: list[Tensor] = []
    sample_losses: list[Tensor] = []
    sigma: list[Tensor] = []
    keys: list[str] = []
    num_tokens, waited_s = 0, 0.0
    unpartitioned: float | None = None
    for batch in batches:
        waited_s += time.perf_counter() - clock
        with expert.context():
            terms = expert.objective.loss(expert.forward, batch)
            engine.backward(terms.loss * expert.loss_scale)
        unpartitioned = norm_without_zero(engine)
        engine.step()  # updates on the last micro-batch only
        losses.append(terms.loss.detach())
        sample_losses.append(terms.sample_losses)
        sigma.append(terms.sigma)
        keys.extend(batch.keys)
        num_tokens += batch.num_tokens
        clock = time.perf_counter()
    return StepResult(
        expert=expert.name,
        component=expert.component,
        loss=torch.stack(losses).mean(),
        sample_losses=torch.cat(sample_losses),
        sigma=torch.cat(sigma),
        grad_norm=engine.get_global_grad_norm() if unpartitioned is None else unpartitioned,
        lr=lr,
        keys=tuple(keys),
        num_tokens=num_tokens,
        data_wait_s=waited_s,
        step_s=time.perf_counter() - started,
        # Every rank sees the same norm, so every rank skips: DeepSpeed decides it before it updates anything.
        skipped=bool(getattr(engine.optimizer, "overflow", False)) or unpartitioned == math.inf,
    )


def norm_without_zero(engine: Any) -> float | None:
    """Return the gradient norm where nothing is partitioned, None elsewhere; infinite gradients are dropped.

    With ZeRO stage 0 DeepSpeed neither tells the norm nor looks for what is not finite. The gradients are the mean over
    the ranks by now, so that every rank drops the same ones, and without a gradient the optimizer moves nothing.
    """
    if engine.zero_optimization_stage() != 0 or not engine.is_gradient_accumulation_boundary():
        return None
    trained = [p for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    if math.isfinite(norm):
        return norm
    for parameter in trained:
        parameter.grad = None
    return math.inf


def train(
    choose: Callable[[Block], Expert],
    batches: Batches,
    state: TrainState,
    *,
    num_steps: int,
    hooks: Sequence[Hook],
    should_stop: Callable[[], bool],
) -> None:
    """Train from `state` until `num_steps` optimizer steps are done or the ranks agree to stop.

    Args:
        choose: says which expert a block trains; the same one on every rank.
        batches: this rank's data.
        state: advanced in place.
        num_steps: optimizer steps of the whole run.
        hooks: called in this order after every step.
        should_stop: asked after every step; collective, the same answer on every rank.
    """
    if state.step >= num_steps:
        return
    for block, micro_batches in batches.steps(state.epoch, state.block):
        expert = choose(block)
        result = train_step(expert, micro_batches, lr=expert.lr_at(state.step))
        state.step += 1
        state.epoch, state.block = block.epoch, block.block + 1
        state.component_steps[expert.component] = state.component_steps.get(expert.component, 0) + 1
        for hook in hooks:
            hook.after_step(state, result)
        if state.step >= num_steps or should_stop():
            return
