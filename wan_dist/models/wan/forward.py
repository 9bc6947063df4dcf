"""One forward per variant, on the libraries' own transformer classes."""

from typing import Any

from torch import Tensor


def predict_velocity(transformer: Any, noisy_latents: Tensor, timestep: Tensor, text_embeds: Tensor) -> Tensor:
    """Return the predicted velocity of a text-to-video batch, [B, C, f, h, w] in the transformer's dtype.

    ti2v-5B's pipeline passes one timestep per token; in text-to-video all are equal, and one per sample gives the
    same numbers without a modulation table per token (tested against diffusers).

    Args:
        transformer: a diffusers `WanTransformer3DModel`, or an engine around one.
        noisy_latents: [B, C, f, h, w], VAE-normalised, in the compute dtype.
        timestep: [B] fp32, 1000 * sigma.
        text_embeds: [B, 512, D], zero after each prompt's true length, in the compute dtype.
    Source: `diffusers/pipelines/wan/pipeline_wan.py`, `WanPipeline.__call__`.
    """
    return transformer(
        hidden_states=noisy_latents, timestep=timestep, encoder_hidden_states=text_embeds, return_dict=False
    )[0]
