"""Learning rate schedules as pure functions of the step, so that resume has nothing to restore."""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ScheduleShape:
    """Numbers that shape some of the schedules.

    Attributes:
        num_cycles: falls from the peak, for cosine_restarts.
        decay_share: share of the steps after the warm-up in which wsd falls, in (0, 1].
    """

    num_cycles: int = 1
    decay_share: float = 0.1


def _constant(_progress: float, _shape: ScheduleShape) -> float:
    return 1.0


def _linear(progress: float, _shape: ScheduleShape) -> float:
    return 1.0 - progress


def _cosine(progress: float, _shape: ScheduleShape) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine_restarts(progress: float, shape: ScheduleShape) -> float:
    """SGDR with cycles of equal length, arXiv:1608.03983."""
    return 0.0 if progress >= 1.0 else _cosine((shape.num_cycles * progress) % 1.0, shape)


def _rex(progress: float, _shape: ScheduleShape) -> float:
    """Reflected exponential: slower than linear at first, faster in the end, arXiv:2107.04197."""
    return (1.0 - progress) / (0.5 + 0.5 * (1.0 - progress))


def _wsd(progress: float, shape: ScheduleShape) -> float:
    """Warm-up, stable, decay: the peak, then linearly down, arXiv:2404.06395."""
    return min((1.0 - progress) / shape.decay_share, 1.0)


SCHEDULES: dict[str, Callable[[float, ScheduleShape], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_restarts": _cosine_restarts,
    "rex": _rex,
    "wsd": _wsd,
}


def learning_rate(
    step: int,
    *,
    peak: float,
    schedule: str,
    warmup_steps: int,
    num_steps: int,
    min_ratio: float,
    shape: ScheduleShape | None = None,
) -> float:
    """Return the learning rate of optimizer step `step`, from 0.

    Args:
        step: steps already done.
        peak: rate at the end of the warm-up.
        schedule: a key of `SCHEDULES`; each goes from 1 at progress 0 to 0 (constant: 1) at progress 1.
        warmup_steps: steps of linear warm-up; the first one already has `peak / warmup_steps`.
        num_steps: steps of the whole run.
        min_ratio: share of `peak` that the schedule falls to.
        shape: what some schedules need besides; None is its defaults.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1.0 - min_ratio) * SCHEDULES[schedule](progress, shape or ScheduleShape()))
