import math
from typing import Any

import numpy as np
import pytest
import torch

from wan_dist.core import unit_distributions
from wan_dist.core.flow_matching import (
    ResolutionShift,
    SigmaSampler,
    add_noise,
    shift_sigma,
    timestep_of,
    unshift_sigma,
    velocity,
)

MILLION = 1_000_000
# The 1 % critical value of the Kolmogorov-Smirnov statistic for a million draws.
KS_LIMIT = 1.63 / math.sqrt(MILLION)
DISTRIBUTIONS: list[dict[str, Any]] = [
    {"sampling": "uniform"},
    {"sampling": "logit_normal", "logit_mean": 0.2, "logit_std": 0.8},
    {"sampling": "mode", "mode_scale": 1.29},
    {"sampling": "mode", "mode_scale": -0.5},
    {"sampling": "sigmoid", "sigmoid_scale": 1.3},
    {"sampling": "beta", "beta_alpha": 0.6, "beta_beta": 0.6},
    {"sampling": "beta", "beta_alpha": 2.0, "beta_beta": 5.0},
]
every_distribution = pytest.mark.parametrize("values", DISTRIBUTIONS, ids=lambda v: "-".join(map(str, v.values())))


def _quantiles(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _draw(sampler: SigmaSampler, count: int = 200_000, seed: int = 0) -> torch.Tensor:
    return sampler.sigma(_quantiles(count, seed)).double()


def _kolmogorov_smirnov(values: torch.Tensor, whole: SigmaSampler) -> float:
    """Return the largest distance of the empirical CDF from the stated one, truncated as `whole` says."""
    low, high = whole.cdf(whole.sigma_min), whole.cdf(whole.sigma_max)
    # Every 50th draw: both functions rise, so this misses less than 50 / a million of the distance.
    some = torch.arange(0, len(values), 50)
    expected = (whole.probabilities(values.sort().values[some]) - low) / (high - low)
    return float((expected - (some + 0.5) / len(values)).abs().max())


def test_endpoints_are_the_latents_and_the_noise():
    latents, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    noisy = add_noise(latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], latents[0])
    assert torch.equal(noisy[1], noise[1])


def test_the_velocity_leads_from_latents_to_noise():
    latents, noise = torch.randn(1, 4, 3, 2, 2), torch.randn(1, 4, 3, 2, 2)
    sigma = torch.tensor([0.3])
    noisy = add_noise(latents, noise, sigma)
    torch.testing.assert_close(noisy + (1.0 - 0.3) * velocity(latents, noise), noise)
    torch.testing.assert_close(noisy - 0.3 * velocity(latents, noise), latents)


def test_sigmas_and_timesteps_are_those_of_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=5.0)
    u = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    ours = shift_sigma(u, 5.0).float()
    # The scheduler builds its table in fp32: equal to a few units in the last place.
    torch.testing.assert_close(ours, scheduler.sigmas[:1000].float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(timestep_of(ours), scheduler.timesteps.float(), rtol=1e-6, atol=1e-4)


def test_the_timestep_keeps_fp32_precision():
    sigma = torch.tensor([0.87501])
    assert timestep_of(sigma).dtype == torch.float32
    assert timestep_of(sigma.bfloat16()).dtype == torch.float32
    assert timestep_of(sigma).item() == pytest.approx(875.01, abs=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_unshift_inverts_shift(shift: float):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    back = [unshift_sigma(float(s), shift) for s in shift_sigma(u, shift)]
    assert np.allclose(back, u.numpy(), atol=1e-12)


@every_distribution
def test_a_million_sigmas_follow_the_stated_distribution_whole_and_truncated(values: dict[str, Any]):
    whole = SigmaSampler(shift=5.0, **values)
    assert _kolmogorov_smirnov(_draw(whole, MILLION), whole) < KS_LIMIT
    part = whole.within(0.3, 0.95)
    drawn = _draw(part, MILLION, seed=1)
    assert 0.3 <= float(drawn.min()) < float(drawn.max()) <= 0.95
    assert _kolmogorov_smirnov(drawn, part) < KS_LIMIT


@every_distribution
def test_two_experts_drawn_per_step_are_jointly_the_distribution_of_one_model(values: dict[str, Any]):
    boundary = 0.875
    for whole in (SigmaSampler(shift=12.0, **values), SigmaSampler(shift=12.0, **values).within(0.2, 0.98)):
        share = whole.probability_above(boundary)
        picks = _quantiles(MILLION, seed=2)
        num_high = int((picks < share).sum())
        assert [whole.expert_of(q, boundary) for q in picks[:20].tolist()] == [
            "high_noise" if q < share else "low_noise" for q in picks[:20].tolist()
        ]
        # 2.58 standard deviations of a binomial: 1 %.
        assert abs(num_high / MILLION - share) < 2.58 * math.sqrt(share * (1 - share) / MILLION)
        high = _draw(whole.within(boundary, 1.0), num_high, seed=3)
        low = _draw(whole.within(0.0, boundary), MILLION - num_high, seed=4)
        assert float(high.min()) >= boundary >= float(low.max())
        assert _kolmogorov_smirnov(torch.cat([high, low]), whole) < KS_LIMIT


def test_the_probability_of_high_noise_at_wans_shifts():
    # Computed from the closed form: u > boundary / (shift - (shift - 1) boundary).
    for shift, boundary, expected in ((12.0, 0.875, 0.6316), (5.0, 0.9, 0.3571)):
        sampler = SigmaSampler(shift=shift)
        assert sampler.probability_above(boundary) == pytest.approx(expected, abs=5e-5)
        assert (_draw(sampler) >= boundary).double().mean().item() == pytest.approx(expected, abs=0.004)
    assert SigmaSampler(shift=5.0, sigma_min=0.9).probability_above(0.9) == 1.0
    assert SigmaSampler(shift=5.0, sigma_max=0.5).probability_above(0.9) == 0.0


def test_mode_and_logit_normal_are_those_of_diffusers_scripts():
    from diffusers.training_utils import compute_density_for_timestep_sampling

    def theirs(scheme: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        drawn = compute_density_for_timestep_sampling(scheme, MILLION, 0.2, 0.8, 1.29, generator=generator)
        return drawn.double()

    mode = SigmaSampler(shift=1.0, sampling="mode", mode_scale=1.29)
    assert _kolmogorov_smirnov(theirs("mode"), mode) < KS_LIMIT
    logit_normal = SigmaSampler(shift=1.0, sampling="logit_normal", logit_mean=0.2, logit_std=0.8)
    assert _kolmogorov_smirnov(theirs("logit_normal"), logit_normal) < KS_LIMIT


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.5, 1.0), (2.0, 5.0), (30.0, 3.0), (100.0, 100.0), (0.1, 0.5)])
def test_beta_is_right_to_its_stated_accuracy(a: float, b: float):
    mpmath = pytest.importorskip("mpmath")  # comes with torch, through sympy
    distribution = unit_distributions.beta(a, b)
    points = torch.tensor([1e-9, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.99, 0.999999], dtype=torch.float64)
    exact = [float(mpmath.betainc(a, b, 0, x, regularized=True)) for x in points.tolist()]
    assert distribution.cdf(points).tolist() == pytest.approx(exact, abs=1e-12)
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    back = distribution.quantile(q)
    assert (back[0], back[-1]) == (0.0, 1.0)
    # Where 1 - u is not representable, the next float64 is as near as one can come.
    reached = (distribution.cdf(back) - q).abs() < 1e-12
    assert (reached | (back > 1 - 1e-8)).all()


def test_a_shift_by_resolution_is_sd3s_and_fluxs():
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    cases: list[tuple[Any, tuple[tuple[int, float], ...]]] = [
        ("exponential", ((256, math.exp(0.5)), (4096, math.exp(1.15)))),
        ("linear", ((256, 0.5), (4096, 1.15))),
    ]
    for rule, points in cases:
        scheduler: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=rule)
        resolution = ResolutionShift(rule, points)
        for num_tokens in (256, 1560, 4096, 8190):
            theirs = scheduler.time_shift(calculate_shift(num_tokens), 1.0, u)
            torch.testing.assert_close(shift_sigma(u, resolution.at(num_tokens)), theirs, rtol=1e-12, atol=0)
    sqrt = ResolutionShift("sqrt", ((75_600, 5.0),))
    assert sqrt.at(75_600) == 5.0
    assert sqrt.at(75_600 // 4) == 2.5


def test_truncation_follows_the_shift_of_the_resolution():
    boundary = 0.9
    whole = SigmaSampler(shift=ResolutionShift("sqrt", ((75_600, 5.0),)), sampling="logit_normal")
    with pytest.raises(ValueError, match="for_tokens"):
        whole.cdf(0.5)
    for num_tokens in (1_560, 75_600):
        high = whole.within(boundary, 1.0).for_tokens(num_tokens)
        drawn = _draw(high, MILLION, seed=num_tokens)
        assert float(drawn.min()) >= boundary
        assert _kolmogorov_smirnov(drawn, high) < KS_LIMIT


def test_extreme_quantiles_stay_finite_and_in_range():
    for values in DISTRIBUTIONS:
        drawn = SigmaSampler(shift=5.0, **values).sigma(torch.tensor([0.0, 2**-53, 1 - 2**-53]))
        assert torch.isfinite(drawn).all()
        assert ((drawn >= 0) & (drawn <= 1)).all()


@pytest.mark.parametrize(
    "values",
    [
        {"shift": 0.0},
        {"shift": -1.0},
        {"shift": 5.0, "sigma_min": 0.9, "sigma_max": 0.8},
        {"shift": 1.0, "mode_scale": 2.0},
    ],
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=r"shift|sigma range|mode_scale"):
        SigmaSampler(**values)


def test_cdf_of_logit_normal_matches_the_error_function():
    sampler = SigmaSampler(shift=1.0, sampling="logit_normal")
    z = math.log(0.7 / 0.3)
    assert sampler.cdf(0.7) == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))))
