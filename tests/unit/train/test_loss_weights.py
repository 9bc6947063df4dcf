"""Weights of samples in the loss: padding counts nothing, and no weights is the plain mean."""

import torch

from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.data.batching import Batch
from wan_dist.train import objective as objectives
from wan_dist.train.objective import Objective


def loss(monkeypatch_target: torch.Tensor, weights: torch.Tensor | None, count: int) -> float:
    latents = torch.arange(3 * 8, dtype=torch.float32).view(3, 2, 1, 2, 2)[:count] / 24
    sampler = SigmaSampler(shift=1.0, sampling="uniform", logit_mean=0.0, logit_std=1.0, sigma_min=0.0, sigma_max=1.0)
    batch = Batch(("k",) * count, 0, tuple(range(count)), latents, monkeypatch_target[:count], None, weights)
    terms = Objective(sampler, torch.float32, 0).loss(None, batch)
    assert terms.sample_losses.shape == terms.sigma.shape == (count,)
    assert not terms.sample_losses.requires_grad
    return float(terms.loss)


def test_weighted_samples_average_as_if_padding_were_not_there(monkeypatch) -> None:
    monkeypatch.setattr(objectives, "predict_velocity", lambda _t, noisy, *_: noisy * 0.5)
    text = torch.zeros(3, 512, 4)
    plain = loss(text, None, 3)
    assert loss(text, torch.ones(3), 3) == plain
    # One of three is padding: the others weigh 3/2.
    torch.testing.assert_close(loss(text, torch.tensor([1.5, 1.5, 0.0]), 3), loss(text, None, 2))
    assert loss(text, torch.full((3,), 0.5), 3) == plain / 2
