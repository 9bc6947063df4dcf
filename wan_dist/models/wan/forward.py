"""One forward per variant, on the libraries' own transformer classes."""

from typing import Any

import torch
from torch import Tensor


def predict_velocity(
    transformer: Any,
    noisy_latents: Tensor,
    timestep: Tensor,
    text_embeds: Tensor,
    condition: Tensor | None,
    first_timestep: Tensor | None = None,
) -> Tensor:
    """Return the predicted velocity of a batch, [B, C, f, h, w] in the transformer's dtype.

    ti2v-5B's pipeline passes one timestep per token. In text-to-video all are equal, and one per sample gives the same
    numbers; with a given first frame there are two per sample (`wan_dist.models.wan.compact`). Both are tested against
    diffusers.

    Args:
        transformer: a diffusers `WanTransformer3DModel`, or an engine around one; with `first_timestep`, one that
            went through `bind_compact`.
        noisy_latents: [B, C, f, h, w], VAE-normalised, in the compute dtype.
        timestep: [B] fp32, 1000 * sigma.
        text_embeds: [B, 512, D], zero after each prompt's true length, in the compute dtype.
        condition: [B, 20, f, h, w] of i2v-A14B: mask, then the given frames' latents; None for the other variants.
        first_timestep: [B] fp32, of the first latent frame's tokens in ti2v-5B, 0 where it is given; None where no
            sample's differs from `timestep`.
    Source: `__call__` of diffusers' `WanPipeline` and `WanImageToVideoPipeline`.
    """
    hidden_states = noisy_latents if condition is None else torch.cat([noisy_latents, condition], dim=1)
    extra = {} if first_timestep is None else {"first_timestep": first_timestep}
    return transformer(
        hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=text_embeds, return_dict=False, **extra
    )[0]
