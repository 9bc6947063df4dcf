"""The constants of the WAN 2.2 variants, as the official repository has them."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from wan_dist.core.errors import ConfigError

PATCH_SIZE = (1, 2, 2)
"""Latents per token (frames, height, width), the same for all variants."""


@dataclass(frozen=True)
class WanVariant:
    """What sets one variant apart from the others.

    Attributes:
        name: official name, such as "ti2v-5B".
        experts: names of its transformers in the order of diffusers' folders `transformer`, `transformer_2`.
        width: channels of the hidden states.
        ffn_width: channels inside the feed-forward layers.
        num_layers: transformer blocks.
        num_heads: attention heads.
        in_channels: latent channels that go into a transformer. i2v-A14B: 16 noisy, 4 mask, 16 condition.
        out_channels: latent channels that come out.
        latent_channels: channels of the VAE's latents.
        vae_stride: pixels per latent (frames, height, width).
        patch_size: latents per token (frames, height, width).
        boundary: share of 1000 at and above which a timestep is the high-noise expert's; None for one transformer.
        flow_shift: shift of the noise schedule.
        num_frames: frames of a full clip, 4n+1.
        fps: frames per second.
        guidance_scales: one per expert, in their order.
        num_inference_steps: denoising steps.
        sizes_px: official (width, height) pairs.
        per_token_timestep: each token carries its own timestep (diffusers' `expand_timesteps`).
        takes_image: a first frame may or, with extra input channels, must be given.
    Source: Wan-Video/Wan2.2 wan/configs/. diffusers' A14B scheduler config differs in the flow shift (3.0).
    """

    name: str
    experts: tuple[str, ...]
    width: int
    ffn_width: int
    num_layers: int
    num_heads: int
    in_channels: int
    out_channels: int
    latent_channels: int
    vae_stride: tuple[int, int, int]
    patch_size: tuple[int, int, int]
    boundary: float | None
    flow_shift: float
    num_frames: int
    fps: int
    guidance_scales: tuple[float, ...]
    num_inference_steps: int
    sizes_px: tuple[tuple[int, int], ...]
    per_token_timestep: bool
    takes_image: bool

    @property
    def num_transformers(self) -> int:
        """Number of experts."""
        return len(self.experts)

    @property
    def pixel_multiple(self) -> int:
        """Pixels that height and width must be a multiple of: one token."""
        return self.vae_stride[1] * self.patch_size[1]

    @property
    def needs_condition(self) -> bool:
        """Whether the input carries mask and condition channels beside the noisy latents."""
        return self.in_channels != self.latent_channels

    def num_tokens(self, num_frames: int, width: int, height: int) -> int:
        """Return the tokens of a video of `num_frames` frames (4n+1) and width x height px."""
        frames = (num_frames - 1) // self.vae_stride[0] + 1
        return frames * (height // self.pixel_multiple) * (width // self.pixel_multiple)


_A14B_SIZES_PX = ((1280, 720), (720, 1280), (832, 480), (480, 832))

VARIANTS: dict[str, WanVariant] = {
    "ti2v-5B": WanVariant(
        name="ti2v-5B",
        experts=("transformer",),
        width=3072,
        ffn_width=14336,
        num_layers=30,
        num_heads=24,
        in_channels=48,
        out_channels=48,
        latent_channels=48,
        vae_stride=(4, 16, 16),
        patch_size=PATCH_SIZE,
        boundary=None,
        flow_shift=5.0,
        num_frames=121,
        fps=24,
        guidance_scales=(5.0,),
        num_inference_steps=50,
        sizes_px=((1280, 704), (704, 1280)),
        per_token_timestep=True,
        takes_image=True,
    ),
    "t2v-A14B": WanVariant(
        name="t2v-A14B",
        experts=("high_noise", "low_noise"),
        width=5120,
        ffn_width=13824,
        num_layers=40,
        num_heads=40,
        in_channels=16,
        out_channels=16,
        latent_channels=16,
        vae_stride=(4, 8, 8),
        patch_size=PATCH_SIZE,
        boundary=0.875,
        flow_shift=12.0,
        num_frames=81,
        fps=16,
        guidance_scales=(4.0, 3.0),
        num_inference_steps=40,
        sizes_px=_A14B_SIZES_PX,
        per_token_timestep=False,
        takes_image=False,
    ),
    "i2v-A14B": WanVariant(
        name="i2v-A14B",
        experts=("high_noise", "low_noise"),
        width=5120,
        ffn_width=13824,
        num_layers=40,
        num_heads=40,
        in_channels=36,
        out_channels=16,
        latent_channels=16,
        vae_stride=(4, 8, 8),
        patch_size=PATCH_SIZE,
        boundary=0.9,
        flow_shift=5.0,
        num_frames=81,
        fps=16,
        guidance_scales=(3.5, 3.5),
        num_inference_steps=40,
        sizes_px=_A14B_SIZES_PX,
        per_token_timestep=False,
        takes_image=True,
    ),
}


def get_variant(name: str) -> WanVariant:
    """Return the constants of a variant.

    Args:
        name: official name; the letter case must match.
    Raises:
        ConfigError: there is no variant of that name.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    by_lower = {known.lower(): known for known in VARIANTS}
    near = difflib.get_close_matches(name.lower(), by_lower, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(by_lower[match] for match in near)}?" if near else "."
    raise ConfigError(f"variant {name!r} is unknown; known are {', '.join(VARIANTS)}{hint}")


def latent_tokens(shape: Sequence[int]) -> int:
    """Return the tokens of one sample of latents of `shape`, [.., f, h, w]."""
    return math.prod(size // patch for size, patch in zip(shape[-3:], PATCH_SIZE, strict=True))
