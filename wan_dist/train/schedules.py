"""Learning rate schedules as pure functions of the step, so that resume has nothing to restore."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def _constant(_progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup_steps: int, num_steps: int, min_ratio: float
) -> float:
    """Return the learning rate of optimizer step `step`, from 0.

    Args:
        step: steps already done.
        peak: rate at the end of the warm-up.
        schedule: a key of `SCHEDULES`; each falls from 1 at progress 0 to 0 (or stays) at progress 1.
        warmup_steps: steps of linear warm-up; the first one already has `peak / warmup_steps`.
        num_steps: steps of the whole run.
        min_ratio: share of `peak` that the schedule falls to.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(num_steps - warmup_steps, 1), 1.0)
    return peak * (min_ratio + (1.0 - min_ratio) * SCHEDULES[schedule](progress))
