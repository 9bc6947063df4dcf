"""The training objective: noise levels and noise keyed by sample position, prediction, loss."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wan_dist.core import flow_matching
from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.core.losses import LossName, Weighting, distance, weighted_mean
from wan_dist.core.rng import generator, uniform
from wan_dist.data.batching import Batch
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import latent_tokens

FIRST_FRAME_NOISE = (-3.5, 0.5)
"""Mean and standard deviation of the logarithm of the noise added to a given first frame.

Source: `masks_like` in `wan/utils/utils.py` of the official repository, which draws it and does not use it."""


@dataclass(frozen=True)
class LossTerms:
    """What one micro-batch gave.

    Attributes:
        loss: scalar fp32, what is differentiated: the mean over samples of loss times weight.
        sample_losses: [B] fp32, detached; each sample's own loss, before the weights of samples and noise levels.
        sigma: [B] fp32, the noise level at which each was taken.
    """

    loss: Tensor
    sample_losses: Tensor
    sigma: Tensor


class Inputs(NamedTuple):
    """What the transformer is given, as `predict_velocity` takes it."""

    noisy_latents: Tensor
    timestep: Tensor
    text_embeds: Tensor
    condition: Tensor | None
    first_timestep: Tensor | None


class BasePrediction(Protocol):
    """What the model predicts without what is being trained."""

    def __call__(self, transformer: Any, inputs: Inputs, *, wanted: bool) -> Tensor | None:
        """Return the prediction without gradient, [B, C, f, h, w], or None if no rank wants it; collective."""
        ...


@dataclass(frozen=True)
class Objective:
    """Flow matching on one expert's range of noise levels.

    Attributes:
        sampler: distribution of sigma.
        dtype: compute dtype of the transformer.
        seed: seed of sigma, noise and conditions.
        kind: how the difference from the target is measured.
        huber_delta: delta of the Huber loss.
        weighting: what a sample's loss is multiplied by at its noise level; None is 1.
        i2v_probability: share of ti2v-5B's samples, of more than one latent frame, whose first frame is given.
        first_frame_noise: add a little noise to given first frames.
        mask_min_weight: what a latent counts that a sample's mask leaves out.
        base_prediction: gives the target of prior samples; None if there are none.
    """

    sampler: SigmaSampler
    dtype: torch.dtype
    seed: int
    kind: LossName = "mse"
    huber_delta: float = 1.0
    weighting: Weighting | None = None
    i2v_probability: float = 0.0
    first_frame_noise: bool = False
    mask_min_weight: float = 0.0
    base_prediction: BasePrediction | None = None

    def draw_sigma(self, batch: Batch) -> Tensor:
        """Return one noise level per sample, [B] fp32 on the batch's device, the same whichever rank asks."""
        quantiles = [uniform(self.seed, "sigma", batch.bucket, position) for position in batch.positions]
        sampler = self.sampler.for_tokens(latent_tokens(batch.latents.shape))
        return sampler.sigma(torch.tensor(quantiles, dtype=torch.float64)).to(batch.latents.device)

    def draw_noise(self, batch: Batch) -> Tensor:
        """Return unit normal noise like the latents, [B, C, f, h, w] fp32, the same whichever rank asks."""
        return self._normal(batch, "noise", batch.latents.shape[1:])

    def draw_first_given(self, batch: Batch) -> list[bool]:
        """Return which samples are image-to-video by a clean first latent frame, the same whichever rank asks.

        A sample of one latent frame, an image, is never: nothing would be left to predict.
        """
        if batch.latents.shape[2] == 1:
            return [False] * len(batch.positions)
        draws = [uniform(self.seed, "i2v", batch.bucket, position) for position in batch.positions]
        return [draw < self.i2v_probability for draw in draws]

    def loss(self, transformer: Any, batch: Batch) -> LossTerms:
        """Return the loss of the predicted velocity, weighted by noise level and by sample."""
        sigma, noise = self.draw_sigma(batch), self.draw_noise(batch)
        given = self.draw_first_given(batch)
        inputs = self._inputs(batch, sigma, noise, given)
        target = self._target(transformer, batch, inputs, noise)
        predicted = predict_velocity(transformer, *inputs)
        elements = distance(predicted, target, self.kind, self.huber_delta)
        samples = weighted_mean(elements, self._places(batch, given))
        weighted = samples if self.weighting is None else samples * self.weighting(sigma)
        weighted = weighted if batch.loss_weights is None else weighted * batch.loss_weights
        return LossTerms(weighted.mean(), samples.detach(), sigma)

    def _inputs(self, batch: Batch, sigma: Tensor, noise: Tensor, given: list[bool]) -> Inputs:
        noisy = flow_matching.add_noise(batch.latents, noise, sigma)
        timestep, first_timestep = flow_matching.timestep_of(sigma), None
        if any(given):
            # The VAE is causal: this is the latent of the first frame encoded alone, bit for bit.
            first = batch.latents[:, :, :1].float()
            if self.first_frame_noise:
                mean, std = FIRST_FRAME_NOISE
                scale = (self._normal(batch, "first_frame_sigma", (1, 1, 1, 1)) * std + mean).exp()
                first = first + scale * self._normal(batch, "first_frame_noise", first.shape[1:])
            chosen = torch.tensor(given, device=noisy.device)
            first = torch.where(chosen.view(-1, 1, 1, 1, 1), first, noisy[:, :, :1])
            noisy = torch.cat([first, noisy[:, :, 1:]], dim=2)
            first_timestep = torch.where(chosen, 0.0, timestep)
        condition = None if batch.condition is None else batch.condition.to(self.dtype)
        return Inputs(noisy.to(self.dtype), timestep, self._text(batch.text_embeds), condition, first_timestep)

    def _target(self, transformer: Any, batch: Batch, inputs: Inputs, noise: Tensor) -> Tensor:
        """Return the velocity to predict, [B, C, f, h, w] fp32; that of the model without adapters in prior samples."""
        target = flow_matching.velocity(batch.latents, noise)
        if self.base_prediction is None:
            return target
        base = self.base_prediction(transformer, inputs, wanted=any(batch.prior))
        if base is None or not any(batch.prior):
            return target
        prior = torch.tensor(batch.prior, device=target.device).view(-1, 1, 1, 1, 1)
        return torch.where(prior, base.float(), target)

    def _places(self, batch: Batch, given: list[bool]) -> Tensor | None:
        """Return what each place of the latents counts, [B, 1, f, h, w] fp32; None where all count the same."""
        if batch.loss_mask is None and not any(given):
            return None
        if batch.loss_mask is None:
            weights = torch.ones_like(batch.latents[:, :1], dtype=torch.float32)
        else:
            weights = self.mask_min_weight + (1.0 - self.mask_min_weight) * batch.loss_mask
        weights[torch.tensor(given, device=weights.device), :, 0] = 0.0
        return weights

    def _normal(self, batch: Batch, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Return unit normal numbers of each sample, [B, *shape] fp32 on the batch's device."""
        # Drawn on the CPU: its generator gives the same numbers on every kind of machine.
        samples = [
            torch.randn(shape, generator=generator(self.seed, purpose, batch.bucket, position))
            for position in batch.positions
        ]
        return torch.stack(samples).to(batch.latents.device)

    def _text(self, text_embeds: Tensor) -> Tensor:
        """Return embeddings in the compute dtype; the token ids of an embedding run stay whole numbers."""
        return text_embeds.to(self.dtype) if text_embeds.is_floating_point() else text_embeds
