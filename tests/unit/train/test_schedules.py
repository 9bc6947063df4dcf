import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from transformers import optimization

from wan_dist.config.schema import OptimConfig
from wan_dist.train.schedules import SCHEDULES, ScheduleShape, learning_rate


def rates(
    schedule: str,
    *,
    warmup_steps: int = 0,
    num_steps: int = 10,
    min_ratio: float = 0.0,
    shape: ScheduleShape | None = None,
) -> list[float]:
    return [
        learning_rate(
            step,
            peak=2.0,
            schedule=schedule,
            warmup_steps=warmup_steps,
            num_steps=num_steps,
            min_ratio=min_ratio,
            shape=shape,
        )
        for step in range(num_steps + 3)
    ]


def test_constant_stays_at_the_peak() -> None:
    assert set(rates("constant", min_ratio=0.1)) == {2.0}


def test_linear_falls_evenly_to_its_floor() -> None:
    assert rates("linear", num_steps=4, min_ratio=0.5)[:5] == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_cosine_is_half_way_in_the_middle() -> None:
    values = rates("cosine")
    assert values[0] == 2.0
    assert values[5] == pytest.approx(1.0)
    assert values[1] == pytest.approx(1.0 + math.cos(math.pi / 10))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_reaches_the_peak_and_never_uses_zero(schedule: str) -> None:
    values = rates(schedule, warmup_steps=4)
    assert values[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "rex", "wsd"])
def test_decay_never_rises_and_stays_at_the_floor_after_the_end(schedule: str) -> None:
    values = rates(schedule, warmup_steps=2, min_ratio=0.25)
    assert values[2:] == sorted(values[2:], reverse=True)
    assert values[10:] == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up_has_rates(schedule: str) -> None:
    assert rates(schedule, warmup_steps=20)[:2] == pytest.approx([0.1, 0.2])


def test_every_name_of_the_config_is_in_the_table() -> None:
    names = OptimConfig.model_json_schema()["properties"]["schedule"]["enum"]
    assert names == list(SCHEDULES)


def theirs(make: Callable[[Optimizer], LRScheduler], num_steps: int) -> list[float]:
    """Return the rates of a library's scheduler at peak 2, from its first step on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_are_those_of_transformers_after_the_warm_up() -> None:
    """Their warm-up starts with a step at rate 0, ours at peak / steps; after it both are at the same progress."""
    cases: dict[str, tuple[Callable[[Optimizer], LRScheduler], ScheduleShape | None]] = {
        "linear": (lambda o: optimization.get_linear_schedule_with_warmup(o, 5, 105), None),
        "cosine": (lambda o: optimization.get_cosine_schedule_with_warmup(o, 5, 105), None),
        "cosine_restarts": (
            lambda o: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(o, 5, 105, num_cycles=3),
            ScheduleShape(num_cycles=3),
        ),
        "wsd": (
            lambda o: optimization.get_wsd_schedule(
                o, num_warmup_steps=5, num_stable_steps=75, num_decay_steps=25, decay_type="linear"
            ),
            ScheduleShape(decay_share=0.25),
        ),
    }
    for name, (make, shape) in cases.items():
        ours = rates(name, warmup_steps=5, num_steps=105, shape=shape)
        assert ours[5:105] == pytest.approx(theirs(make, 105)[5:], abs=1e-12), name


def test_cosine_to_a_floor_is_torchs() -> None:
    expected = theirs(lambda o: CosineAnnealingLR(o, T_max=50, eta_min=0.2), 50)
    assert rates("cosine", num_steps=50, min_ratio=0.1)[:50] == pytest.approx(expected, abs=1e-9)


def test_rex_is_its_papers_formula() -> None:
    values = rates("rex", num_steps=4)
    assert values[:5] == pytest.approx([2 * (1 - p) / (0.5 + 0.5 * (1 - p)) for p in (0, 0.25, 0.5, 0.75, 1)])
    assert values[2] == pytest.approx(2 * 2 / 3)
