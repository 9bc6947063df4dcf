import math

import pytest

from wan_dist.train.schedules import SCHEDULES, learning_rate


def rates(schedule: str, *, warmup_steps: int = 0, num_steps: int = 10, min_ratio: float = 0.0) -> list[float]:
    return [
        learning_rate(
            step,
            peak=2.0,
            schedule=schedule,
            warmup_steps=warmup_steps,
            num_steps=num_steps,
            min_ratio=min_ratio,
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


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_never_rises_and_stays_at_the_floor_after_the_end(schedule: str) -> None:
    values = rates(schedule, warmup_steps=2, min_ratio=0.25)
    assert values[2:] == sorted(values[2:], reverse=True)
    assert values[10:] == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_all_warm_up_has_rates(schedule: str) -> None:
    assert rates(schedule, warmup_steps=20)[:2] == pytest.approx([0.1, 0.2])
