"""Distributions on [0, 1] as pairs of a CDF and its inverse, float64: noise levels are drawn from one, then shifted.

Drawing through the inverse CDF lets any range be cut out by truncation: a uniform number between two quantiles gives
exactly the distribution's shape inside of the range, without rejecting and without rescaling.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

MAX_MODE_SCALE = 2.0 / (math.pi - 2.0)
"""Largest scale at which mode sampling is a monotone map of the unit interval; the smallest is -1."""

_NUM_NODES = 1025
_MAX_NEWTON_STEPS = 100
_MAX_FRACTION_TERMS = 500


@dataclass(frozen=True)
class UnitDistribution:
    """A distribution on [0, 1].

    Attributes:
        cdf: P(u <= x) of x [..] float64 in [0, 1], same shape.
        quantile: inverse of `cdf`, of probabilities [..] float64 in [0, 1], same shape.
    """

    cdf: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]


def uniform() -> UnitDistribution:
    """Return the uniform distribution."""
    return UnitDistribution(lambda x: x, lambda q: q)


def logit_normal(mean: float, std: float) -> UnitDistribution:
    """Return the distribution of sigmoid(mean + std * z), z unit normal.

    Args:
        mean: of logit(u).
        std: of logit(u), > 0.
    Source: arXiv:2403.03206 section 3.1; with mean 0 it is kohya's `sigmoid(scale * z)`.
    """
    return UnitDistribution(
        lambda x: torch.special.ndtr((torch.logit(x) - mean) / std),
        lambda q: torch.sigmoid(torch.special.ndtri(q) * std + mean),
    )


def mode(scale: float) -> UnitDistribution:
    """Return SD3's mode sampling: density highest in the middle for scale > 0, at both ends for scale < 0.

    The paper maps a uniform v to 1 - v - s * (cos^2(pi / 2 * v) - 1 + v), which falls with v; read from the other
    end it is the quantile function q + s * (q - sin^2(pi / 2 * q)). The CDF inverts it by bisection, to 1e-15.

    Args:
        scale: s, from -1 to 2 / (pi - 2).
    Source: arXiv:2403.03206 equation 20; diffusers `compute_density_for_timestep_sampling`.
    """

    def quantile(q: Tensor) -> Tensor:
        return q + scale * (q - torch.sin(0.5 * math.pi * q).square())

    def cdf(x: Tensor) -> Tensor:
        low, high = torch.zeros_like(x), torch.ones_like(x)
        for _ in range(53):
            middle = 0.5 * (low + high)
            below = quantile(middle) < x
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        # Exact at the ends, where ranges that are not cut lie.
        return torch.where(x <= 0, 0.0, torch.where(x >= 1, 1.0, 0.5 * (low + high)))

    return UnitDistribution(cdf, quantile)


@lru_cache(maxsize=8)
def beta(a: float, b: float) -> UnitDistribution:
    """Return the Beta(a, b) distribution; CDF to 1e-12, quantiles to 1e-12 in probability or 1e-16 in u.

    Args:
        a: > 0; below 1 the density rises without limit at 0.
        b: > 0; below 1 the density rises without limit at 1.
    Source: Numerical Recipes section 6.4 (continued fraction of the incomplete beta function), inverted by Newton's
    method between the nodes of a table, with bisection where a step leaves its bracket.
    """
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    nodes = torch.sin(torch.linspace(0, 0.5 * math.pi, _NUM_NODES, dtype=torch.float64)).square()
    table = _incomplete_beta(nodes, a, b, log_beta)

    def quantile(q: Tensor) -> Tensor:
        flat = q.reshape(-1)
        right = torch.searchsorted(table, flat).clamp(1, _NUM_NODES - 1)
        low, high = nodes[right - 1], nodes[right]
        x = 0.5 * (low + high)
        active = torch.arange(len(flat))
        for _ in range(_MAX_NEWTON_STEPS):
            x_now, low_now, high_now = x[active], low[active], high[active]
            error = _incomplete_beta(x_now, a, b, log_beta) - flat[active]
            wrong = error.abs() > 1e-13
            low_now, high_now = torch.where(error < 0, x_now, low_now), torch.where(error < 0, high_now, x_now)
            density = torch.exp((a - 1) * torch.log(x_now) + (b - 1) * torch.log1p(-x_now) - log_beta)
            newton = x_now - error / density
            inside = (newton > low_now) & (newton < high_now)
            better = torch.where(inside, newton, 0.5 * (low_now + high_now))
            x[active] = torch.where(wrong, better, x_now)
            low[active], high[active] = low_now, high_now
            active = active[wrong]
            if len(active) == 0:
                break
        return torch.where(flat <= 0, 0.0, torch.where(flat >= 1, 1.0, x)).view(q.shape)

    return UnitDistribution(lambda x: _incomplete_beta(x, a, b, log_beta), quantile)


def _incomplete_beta(x: Tensor, a: float, b: float, log_beta: float) -> Tensor:
    """Return the regularised incomplete beta function I_x(a, b), same shape, float64."""
    # The fraction converges fast left of this point; right of it the mirrored function is taken.
    mirrored = x > (a + 1.0) / (a + b + 2.0)
    y = torch.where(mirrored, 1.0 - x, x)
    # Two Python numbers in `where` would become float32.
    first = torch.full_like(x, a).masked_fill(mirrored, b)
    second = torch.full_like(x, b).masked_fill(mirrored, a)
    front = torch.exp(first * torch.log(y) + second * torch.log1p(-y) - log_beta) / first
    value = front * _beta_fraction(y, first, second)
    return torch.where(mirrored, 1.0 - value, value)


def _beta_fraction(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the continued fraction of the incomplete beta function by Lentz's method, same shape."""
    tiny = 1e-300
    c = torch.ones_like(x)
    d = 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / torch.where(d.abs() < tiny, tiny, d)
    total = d
    for m in range(1, _MAX_FRACTION_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0))
        factor = torch.ones_like(x)
        for term in (even, odd):
            d = 1.0 + term * d
            c = 1.0 + term / c
            d = 1.0 / torch.where(d.abs() < tiny, tiny, d)
            c = torch.where(c.abs() < tiny, tiny, c)
            factor = c * d
            total = total * factor
        if bool(((factor - 1.0).abs() < 1e-15).all()):
            break
    return total
