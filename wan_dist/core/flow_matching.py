"""Rectified flow as WAN 2.2 uses it: sigma, noisy latents, velocity target, timestep.

sigma runs from 0 (clean) to 1 (pure noise). Everything here is fp32 and exact: the timestep is 1000 * sigma, never
rounded, never off by one.

Sources: rectified flow, arXiv:2209.03003; the shift, arXiv:2403.03206 section 5.3.2 and `wan/utils/fm_solvers.py` of
the official WAN 2.2 repository.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000

Sampling = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class SigmaSampler:
    """How a uniform number becomes a noise level.

    The distribution of u before the shift is restricted by truncation (its inverse CDF is read between two
    quantiles), so that two experts that split [0, 1] at the boundary together see exactly the untruncated one.

    Attributes:
        shift: flow shift, > 0. WAN 2.2: 5 (ti2v-5B), 12 (t2v-A14B), 5 (i2v-A14B).
        sampling: distribution of u before the shift.
        logit_mean: mean of logit(u), for logit_normal.
        logit_std: standard deviation of logit(u), for logit_normal.
        sigma_min: lowest sigma drawn.
        sigma_max: highest sigma drawn.
    """

    shift: float
    sampling: Sampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside of their range."""
        if not self.shift > 0:
            raise ValueError(f"shift = {self.shift} is not positive")
        if not 0.0 <= self.sigma_min < self.sigma_max <= 1.0:
            raise ValueError(f"sigma range [{self.sigma_min}, {self.sigma_max}] is not inside [0, 1]")

    def cdf(self, sigma: float) -> float:
        """Return P(drawn sigma <= `sigma`) of the untruncated distribution."""
        u = unshift_sigma(sigma, self.shift)
        if self.sampling == "uniform":
            return u
        if u <= 0.0 or u >= 1.0:
            return float(u >= 1.0)
        z = (math.log(u / (1.0 - u)) - self.logit_mean) / self.logit_std
        return 0.5 * math.erfc(-z / math.sqrt(2.0))

    def sigma(self, quantile: Tensor) -> Tensor:
        """Return the noise levels at `quantile` of the truncated distribution, same shape, fp32.

        Args:
            quantile: uniform numbers in [0, 1).
        """
        low, high = self.cdf(self.sigma_min), self.cdf(self.sigma_max)
        q = low + quantile.double() * (high - low)
        if self.sampling == "uniform":
            u = q
        else:
            u = torch.sigmoid(torch.special.ndtri(q) * self.logit_std + self.logit_mean)
        # The clamp only catches rounding at the two ends: the truncation above already keeps the range.
        return shift_sigma(u, self.shift).clamp(self.sigma_min, self.sigma_max).float()


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Return sigma = shift * u / (1 + (shift - 1) * u), same shape and dtype as `u`, in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: float, shift: float) -> float:
    """Return the u in [0, 1] whose shifted value is `sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def timestep_of(sigma: Tensor) -> Tensor:
    """Return the transformer's timestep, 1000 * sigma, fp32, same shape."""
    return sigma.float() * NUM_TRAIN_TIMESTEPS


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return latents moved toward noise on the straight flow path, [B, C, f, h, w] fp32.

    Args:
        latents: [B, C, f, h, w], VAE-normalised.
        noise: same shape, unit normal.
        sigma: [B], 0 is clean, 1 is pure noise.
    """
    s = sigma.float().view(-1, 1, 1, 1, 1)
    return (1.0 - s) * latents.float() + s * noise.float()


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """Return the training target d x_t / d sigma = noise - latents, [B, C, f, h, w] fp32."""
    return noise.float() - latents.float()
