"""Losses and weightings against the libraries and peers that define them."""

import math

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from wan_dist.core.losses import distance, weighted_mean, weighting

SIGMA = torch.linspace(0.001, 1.0, 1000)


@pytest.mark.parametrize("name", ["none", "sigma_sqrt", "cosmap"])
def test_weightings_are_those_of_sd3(name: str) -> None:
    found = weighting(name, 5.0)(SIGMA)  # type: ignore[arg-type]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, compute_loss_weighting_for_sd3(name, SIGMA))


def test_sigma_sqrt_is_finite_at_zero() -> None:
    assert float(weighting("sigma_sqrt", 5.0)(torch.zeros(1))) == pytest.approx(1e6)


@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_the_bell_is_diffsynths(shift: float) -> None:
    # `FlowMatchScheduler.set_timesteps_wan` and `set_training_weight` of DiffSynth-Studio, 1000 steps.
    u = torch.linspace(1.0, 0.0, 1001)[:-1]
    timesteps = shift * u / (1 + (shift - 1) * u) * 1000
    y = torch.exp(-2 * ((timesteps - 500) / 1000) ** 2)
    theirs = (y - y.min()) * (1000 / (y - y.min()).sum())
    found = weighting("bell", shift)(timesteps / 1000)
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-5)
    assert float(found.mean()) == pytest.approx(1.0, rel=1e-3)


def test_distances_are_their_formulas() -> None:
    d = torch.linspace(-3, 3, 25)
    zero = torch.zeros_like(d)
    assert torch.equal(distance(d, zero, "mse", 1.0), d**2)
    assert torch.equal(distance(d, zero, "mae", 1.0), d.abs())
    for delta in (0.1, 1.0, 2.0):
        wanted = [x * x / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2) for x in d.tolist()]
        torch.testing.assert_close(distance(d, zero, "huber", delta), torch.tensor(wanted))
    found = distance(d.bfloat16(), zero.bfloat16(), "mse", 1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, d.bfloat16().float() ** 2)


def test_weighted_means_leave_out_what_weighs_nothing() -> None:
    elements = torch.arange(2 * 3 * 2 * 1 * 2.0).view(2, 3, 2, 1, 2)
    weights = torch.ones(2, 1, 2, 1, 2)
    torch.testing.assert_close(weighted_mean(elements, weights), weighted_mean(elements, None))
    weights[0, :, 0] = 0.0
    weights[1] = 0.0
    found = weighted_mean(elements, weights)
    assert float(found[0]) == pytest.approx(float(elements[0, :, 1].mean()))
    assert math.isfinite(float(found[1]))
    assert float(found[1]) == 0.0
