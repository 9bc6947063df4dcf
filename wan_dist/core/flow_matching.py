"""Rectified flow as WAN 2.2 uses it: sigma, noisy latents, velocity target, timestep.

sigma runs from 0 (clean) to 1 (pure noise). Everything here is fp32 and exact: the timestep is 1000 * sigma, never
rounded, never off by one.

Sources: rectified flow, arXiv:2209.03003; the shift, arXiv:2403.03206 section 5.3.2 and `wan/utils/fm_solvers.py` of
the official WAN 2.2 repository.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import torch
from torch import Tensor

from wan_dist.core import unit_distributions
from wan_dist.core.unit_distributions import MAX_MODE_SCALE, UnitDistribution

NUM_TRAIN_TIMESTEPS = 1000

Sampling = Literal["uniform", "logit_normal", "mode", "sigmoid", "beta"]
ShiftRule = Literal["sqrt", "linear", "exponential"]
ExpertOfStep = Literal["high_noise", "low_noise"]
Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class ResolutionShift:
    """A flow shift that grows with the number of tokens of a video.

    Attributes:
        rule: sqrt: shift * sqrt(tokens / tokens of the last point), SD3's rule that keeps the uncertainty of a noisy
            pixel the same at every size; linear: a straight line through two points, diffusers' `calculate_shift`
            with `time_shift_type` linear; exponential: the same with log(shift), as Flux has it.
        points: (tokens, shift) pairs, one for sqrt, two for the others. Beyond them the rule goes on.
    Source: arXiv:2403.03206 equation 23; `calculate_shift` in diffusers' `pipelines/flux/pipeline_flux.py` and
    `time_shift` of its `FlowMatchEulerDiscreteScheduler`.
    """

    rule: ShiftRule
    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        """Refuse points that give no line, or no positive shift."""
        needed = 1 if self.rule == "sqrt" else 2
        if len(self.points) != needed:
            raise ValueError(f"shift rule {self.rule} takes {needed} points, not {len(self.points)}")
        if any(tokens <= 0 or not shift > 0 for tokens, shift in self.points):
            raise ValueError(f"points {self.points}: tokens and shifts are positive")
        if needed == 2 and self.points[0][0] == self.points[1][0]:
            raise ValueError(f"points {self.points}: both have the same number of tokens")

    def at(self, num_tokens: int) -> float:
        """Return the shift of videos with `num_tokens` tokens.

        Raises:
            ValueError: the straight line is not positive there.
        """
        (tokens, shift), *rest = self.points
        if not rest:
            return shift * math.sqrt(num_tokens / tokens)
        (last_tokens, last_shift) = rest[0]
        share = (num_tokens - tokens) / (last_tokens - tokens)
        if self.rule == "exponential":
            return math.exp(math.log(shift) + share * (math.log(last_shift) - math.log(shift)))
        value = shift + share * (last_shift - shift)
        if not value > 0:
            raise ValueError(f"the line through {self.points} gives shift {value:.3g} at {num_tokens} tokens")
        return value


@dataclass(frozen=True)
class SigmaSampler:
    """How a uniform number becomes a noise level.

    The distribution of u before the shift is restricted by truncation (its inverse CDF is read between two
    quantiles), so that two experts that split [0, 1] at the boundary together see exactly the untruncated one.

    Attributes:
        shift: flow shift, > 0, or the rule that gives it (then `for_tokens` first). WAN 2.2: 5 (ti2v-5B),
            12 (t2v-A14B), 5 (i2v-A14B).
        sampling: distribution of u before the shift.
        logit_mean: mean of logit(u), for logit_normal.
        logit_std: standard deviation of logit(u), for logit_normal.
        sigmoid_scale: u = sigmoid(scale * z) with z unit normal, for sigmoid.
        mode_scale: SD3's s, for mode.
        beta_alpha: first parameter of the beta distribution.
        beta_beta: second parameter of the beta distribution.
        sigma_min: lowest sigma drawn.
        sigma_max: highest sigma drawn.
    """

    shift: float | ResolutionShift
    sampling: Sampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    sigmoid_scale: float = 1.0
    mode_scale: float = 1.29
    beta_alpha: float = 0.6
    beta_beta: float = 0.6

    def __post_init__(self) -> None:
        """Refuse values outside of their range."""
        if not isinstance(self.shift, ResolutionShift) and not self.shift > 0:
            raise ValueError(f"shift = {self.shift} is not positive")
        if not 0.0 <= self.sigma_min < self.sigma_max <= 1.0:
            raise ValueError(f"sigma range [{self.sigma_min}, {self.sigma_max}] is not inside [0, 1]")
        if not -1.0 <= self.mode_scale <= MAX_MODE_SCALE:
            raise ValueError(f"mode_scale = {self.mode_scale} is not in [-1, {MAX_MODE_SCALE:.3f}]")

    def for_tokens(self, num_tokens: int) -> "SigmaSampler":
        """Return the sampler of videos with `num_tokens` tokens, whose shift is a number."""
        return replace(self, shift=self.shift.at(num_tokens)) if isinstance(self.shift, ResolutionShift) else self

    def within(self, sigma_min: float, sigma_max: float) -> "SigmaSampler":
        """Return the sampler truncated further, to what its range and this one share.

        Raises:
            ValueError: they share nothing.
        """
        return replace(self, sigma_min=max(self.sigma_min, sigma_min), sigma_max=min(self.sigma_max, sigma_max))

    def cdf(self, sigma: float) -> float:
        """Return P(drawn sigma <= `sigma`) of the untruncated distribution."""
        return float(self.probabilities(torch.tensor(sigma, dtype=torch.float64)))

    def probabilities(self, sigma: Tensor) -> Tensor:
        """Return P(drawn sigma <= each `sigma`) of the untruncated distribution, same shape, float64."""
        return self._unit.cdf(unshift_sigma(sigma.double(), self._shift_number()))

    def probability_above(self, boundary: float) -> float:
        """Return P(drawn sigma >= `boundary`) of the truncated distribution: how often the high-noise expert is due."""
        low, high = self.cdf(self.sigma_min), self.cdf(self.sigma_max)
        at = min(max(self.cdf(boundary), low), high)
        return (high - at) / (high - low)

    def expert_of(self, quantile: float, boundary: float) -> ExpertOfStep:
        """Return the expert of a step, high_noise with P(drawn sigma >= `boundary`).

        Samples of the step that are then drawn from this distribution truncated to the expert's range have, over
        many steps, jointly this very distribution.

        Args:
            quantile: a uniform number in [0, 1), the same on all ranks.
            boundary: sigma at and above which the high-noise expert predicts.
        """
        return "high_noise" if quantile < self.probability_above(boundary) else "low_noise"

    def sigma(self, quantile: Tensor) -> Tensor:
        """Return the noise levels at `quantile` of the truncated distribution, same shape, fp32.

        Args:
            quantile: uniform numbers in [0, 1).
        """
        low, high = self.cdf(self.sigma_min), self.cdf(self.sigma_max)
        u = self._unit.quantile(low + quantile.double() * (high - low))
        # The clamp only catches rounding at the two ends: the truncation above already keeps the range.
        return shift_sigma(u, self._shift_number()).clamp(self.sigma_min, self.sigma_max).float()

    @cached_property
    def _unit(self) -> UnitDistribution:
        return UNIT_DISTRIBUTIONS[self.sampling](self)

    def _shift_number(self) -> float:
        if isinstance(self.shift, ResolutionShift):
            raise ValueError("the shift depends on the number of tokens: ask for_tokens() for a sampler first")
        return self.shift


UNIT_DISTRIBUTIONS: dict[str, Callable[[SigmaSampler], UnitDistribution]] = {
    "uniform": lambda _: unit_distributions.uniform(),
    "logit_normal": lambda s: unit_distributions.logit_normal(s.logit_mean, s.logit_std),
    "sigmoid": lambda s: unit_distributions.logit_normal(0.0, s.sigmoid_scale),
    "mode": lambda s: unit_distributions.mode(s.mode_scale),
    "beta": lambda s: unit_distributions.beta(s.beta_alpha, s.beta_beta),
}


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """Return sigma = shift * u / (1 + (shift - 1) * u), same shape and dtype as `u`, in [0, 1]."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Number, shift: float) -> Number:
    """Return the u in [0, 1] whose shifted value is `sigma`, same shape and dtype."""
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
