import math
from typing import Any

import numpy as np
import pytest
import torch

from wan_dist.core.flow_matching import (
    SigmaSampler,
    add_noise,
    shift_sigma,
    timestep_of,
    unshift_sigma,
    velocity,
)


def _draw(sampler: SigmaSampler, count: int = 200_000) -> np.ndarray:
    quantiles = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sampler.sigma(quantiles).double().numpy()


def _kolmogorov_smirnov(values: np.ndarray, cdf) -> float:
    expected = np.array([cdf(float(v)) for v in np.sort(values)])
    return float(np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max())


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


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0, 12.0])
def test_drawn_sigmas_follow_the_stated_distribution(sampling, shift: float):
    sampler = SigmaSampler(shift=shift, sampling=sampling, logit_mean=0.2, logit_std=0.8)
    # The 1 % critical value of the KS statistic for 2e5 draws is 1.63 / sqrt(2e5) = 0.0036.
    assert _kolmogorov_smirnov(_draw(sampler), sampler.cdf) < 0.0036


def test_the_probability_of_high_noise_at_wans_shifts():
    # Computed from the closed form: u > boundary / (shift - (shift - 1) boundary).
    for shift, boundary, expected in ((12.0, 0.875, 0.6316), (5.0, 0.9, 0.3571)):
        drawn = _draw(SigmaSampler(shift=shift))
        assert (drawn >= boundary).mean() == pytest.approx(expected, abs=0.004)


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_two_experts_together_are_the_untruncated_distribution(sampling):
    whole = SigmaSampler(shift=12.0, sampling=sampling)
    high = SigmaSampler(shift=12.0, sampling=sampling, sigma_min=0.875)
    low = SigmaSampler(shift=12.0, sampling=sampling, sigma_max=0.875)
    share_low = whole.cdf(0.875)
    drawn_high, drawn_low = _draw(high), _draw(low)
    assert drawn_high.min() >= 0.875
    assert drawn_low.max() <= 0.875
    for threshold in (0.2, 0.5, 0.8, 0.9, 0.95, 0.99):
        joint = share_low * (drawn_low <= threshold).mean() + (1 - share_low) * (drawn_high <= threshold).mean()
        assert joint == pytest.approx(whole.cdf(threshold), abs=0.005)


def test_extreme_quantiles_stay_finite_and_in_range():
    for sampling in ("uniform", "logit_normal"):
        drawn = SigmaSampler(shift=5.0, sampling=sampling).sigma(torch.tensor([0.0, 2**-53, 1 - 2**-53]))
        assert torch.isfinite(drawn).all()
        assert ((drawn >= 0) & (drawn <= 1)).all()


@pytest.mark.parametrize(
    "values", [{"shift": 0.0}, {"shift": -1.0}, {"shift": 5.0, "sigma_min": 0.9, "sigma_max": 0.8}]
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=r"shift|sigma range"):
        SigmaSampler(**values)


def test_cdf_of_logit_normal_matches_the_error_function():
    sampler = SigmaSampler(shift=1.0, sampling="logit_normal")
    z = math.log(0.7 / 0.3)
    assert sampler.cdf(0.7) == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))))
