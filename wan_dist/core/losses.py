"""How far a prediction is from its target, and what that counts at a noise level. All in fp32."""

import math
from collections.abc import Callable
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.core.flow_matching import NUM_TRAIN_TIMESTEPS, shift_sigma

LossName = Literal["mse", "huber", "mae"]
WeightingName = Literal["none", "sigma_sqrt", "cosmap", "bell"]
Weighting = Callable[[Tensor], Tensor]
"""Noise levels [B] in [0, 1] to weights [B] fp32."""

_MIN_SIGMA: Final = 1.0 / NUM_TRAIN_TIMESTEPS


def distance(predicted: Tensor, target: Tensor, kind: LossName, huber_delta: float) -> Tensor:
    """Return the loss of every element, same shape, fp32.

    Args:
        predicted: any shape.
        target: same shape.
        kind: mse d^2; mae |d|; huber d^2 / 2 up to |d| = delta, and delta * (|d| - delta / 2) beyond.
        huber_delta: delta.
    """
    predicted, target = predicted.float(), target.float()
    if kind == "mse":
        return F.mse_loss(predicted, target, reduction="none")
    if kind == "mae":
        return F.l1_loss(predicted, target, reduction="none")
    return F.huber_loss(predicted, target, reduction="none", delta=huber_delta)


def weighting(name: WeightingName, shift: float) -> Weighting:
    """Return what a sample's loss is multiplied by at its noise level.

    Args:
        name: none 1; sigma_sqrt 1 / sigma^2; cosmap 2 / (pi (1 - 2 sigma + 2 sigma^2)); bell a Gaussian around
            timestep 500, 0 at 1000.
        shift: flow shift of the schedule over which the bell has the mean 1.
    Source: sigma_sqrt and cosmap as SD3, arXiv:2403.03206, in diffusers' `compute_loss_weighting_for_sd3`, whose
    lowest sigma is 1/1000; bell as DiffSynth-Studio's `FlowMatchScheduler.set_training_weight`.
    """
    if name == "bell":
        grid = _bell(shift_sigma(1.0 - torch.arange(NUM_TRAIN_TIMESTEPS).double() / NUM_TRAIN_TIMESTEPS, shift))
        lowest, mean = float(grid.min()), float((grid - grid.min()).mean())
        return lambda sigma: ((_bell(sigma.double()) - lowest) / mean).float()
    return {"none": torch.ones_like, "sigma_sqrt": _sigma_sqrt, "cosmap": _cosmap}[name]


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2.0 * (sigma - 0.5) ** 2)


def _sigma_sqrt(sigma: Tensor) -> Tensor:
    return sigma.float().clamp(min=_MIN_SIGMA) ** -2.0


def _cosmap(sigma: Tensor) -> Tensor:
    s = sigma.float()
    return 2.0 / (math.pi * (1.0 - 2.0 * s + 2.0 * s**2))


def weighted_mean(elements: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean over each sample's elements, [B] fp32; 0 for a sample whose weights are all 0.

    Args:
        elements: [B, C, f, h, w].
        weights: [B, 1, f, h, w], at least 0; None weighs all alike.
    """
    if weights is None:
        return elements.flatten(1).mean(1)
    places = elements.mean(dim=1, keepdim=True)
    total = weights.flatten(1).sum(1)
    return (places * weights).flatten(1).sum(1) / total.clamp(min=torch.finfo(torch.float32).tiny)
