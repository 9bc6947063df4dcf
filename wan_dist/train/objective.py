"""The training objective: noise levels and noise keyed by sample position, prediction, loss."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wan_dist.core import flow_matching
from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.core.rng import generator, uniform
from wan_dist.data.batching import Batch
from wan_dist.models.wan.forward import predict_velocity


@dataclass(frozen=True)
class LossTerms:
    """What one micro-batch gave.

    Attributes:
        loss: scalar fp32, what is differentiated: the mean over samples of loss times weight.
        sample_losses: [B] fp32, detached; each sample's own loss, before any weight.
        sigma: [B] fp32, the noise level at which each was taken.
    """

    loss: Tensor
    sample_losses: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Objective:
    """Flow matching on one expert's range of noise levels.

    Attributes:
        sampler: distribution of sigma.
        dtype: compute dtype of the transformer.
        seed: seed of sigma and noise.
    """

    sampler: SigmaSampler
    dtype: torch.dtype
    seed: int

    def draw_sigma(self, batch: Batch) -> Tensor:
        """Return one noise level per sample, [B] fp32 on the batch's device, the same whichever rank asks."""
        quantiles = [uniform(self.seed, "sigma", batch.bucket, position) for position in batch.positions]
        return self.sampler.sigma(torch.tensor(quantiles, dtype=torch.float64)).to(batch.latents.device)

    def draw_noise(self, batch: Batch) -> Tensor:
        """Return unit normal noise like the latents, [B, C, f, h, w] fp32, the same whichever rank asks."""
        shape = batch.latents.shape[1:]
        # Drawn on the CPU: its generator gives the same numbers on every kind of machine.
        samples = [
            torch.randn(shape, generator=generator(self.seed, "noise", batch.bucket, position))
            for position in batch.positions
        ]
        return torch.stack(samples).to(batch.latents.device)

    def loss(self, transformer: Any, batch: Batch) -> LossTerms:
        """Return the mean squared error of the predicted velocity, weighted by sample where weights are given."""
        sigma, noise = self.draw_sigma(batch), self.draw_noise(batch)
        noisy_latents = flow_matching.add_noise(batch.latents, noise, sigma)
        predicted = predict_velocity(
            transformer,
            noisy_latents.to(self.dtype),
            flow_matching.timestep_of(sigma),
            batch.text_embeds.to(self.dtype),
            None if batch.condition is None else batch.condition.to(self.dtype),
        )
        target = flow_matching.velocity(batch.latents, noise)
        samples = F.mse_loss(predicted.float(), target, reduction="none").flatten(1).mean(1)
        weighted = samples if batch.loss_weights is None else samples * batch.loss_weights
        return LossTerms(weighted.mean(), samples.detach(), sigma)
