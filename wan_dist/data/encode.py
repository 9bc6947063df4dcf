"""Clips and captions into what the transformer sees: normalised latents and text embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wan_dist.core.errors import ModelError
from wan_dist.models.wan.condition import FRAMES_PER_LATENT, condition_video, given_frames_mask

MAX_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Encoders:
    """The frozen VAE and text encoder of a pipeline.

    Attributes:
        vae: diffusers `AutoencoderKLWan`, fp32; None where latents are cached.
        text_pipeline: a diffusers `WanPipeline` without transformer, which owns cleaning, tokenising and padding;
            None where text is cached.
        latents_mean: [1, C, 1, 1, 1] fp32, subtracted from the posterior mean.
        latents_std: [1, C, 1, 1, 1] fp32, which it is then divided by.
        device: where encoding happens.
        stride: pixels per latent (frames; height and width).
    """

    vae: Any
    text_pipeline: Any
    latents_mean: Tensor
    latents_std: Tensor
    device: torch.device
    stride: tuple[int, int]

    @torch.no_grad()
    def encode_video(self, frames: NDArray[np.uint8]) -> Tensor:
        """Return the normalised posterior mean, [B, C, f, h, w] fp32 on the device.

        Args:
            frames: [B, F, H, W, 3] RGB in 0..255.
        Source: `wan/modules/vae2_2.py` of the official repository, `Wan2_2_VAE.encode` (mean, then (x - mean) / std).
        """
        return self.normalise(self._mean(self._video(frames)))

    @torch.no_grad()
    def encode_condition(self, frames: NDArray[np.uint8], with_last: Sequence[bool]) -> Tensor:
        """Return i2v-A14B's condition on the given frames: mask, then normalised latents, [B, 4 + C, f, h, w] fp32.

        Args:
            frames: [B, F, H, W, 3] RGB in 0..255.
            with_last: of each sample, whether its last frame is given beside the first.
        """
        return self.with_mask(self._mean(condition_video(self._video(frames), with_last)), with_last)

    @torch.no_grad()
    def encode_parts(self, frames: NDArray[np.uint8], parts: Sequence[str]) -> dict[str, Tensor]:
        """Return what a cache of latents holds: posterior means, not normalised, [B, C, f, h, w] fp32 on the device.

        Args:
            frames: [B, F, H, W, 3] RGB in 0..255.
            parts: of `latents`, `condition` (the first frame, then zeros) and `condition_last` (the first frame,
                zeros, the last frame).
        """
        video = self._video(frames)
        views = {
            "latents": lambda: video,
            "condition": lambda: condition_video(video, [False] * len(video)),
            "condition_last": lambda: condition_video(video, [True] * len(video)),
        }
        return {part: self._mean(views[part]()).float() for part in parts}

    def with_mask(self, latents: Tensor, with_last: Sequence[bool]) -> Tensor:
        """Return the mask of the given frames, then normalised latents, [B, 4 + C, f, h, w] fp32.

        Args:
            latents: [B, C, f, h, w], posterior mean of the given frames and zeros, not normalised.
            with_last: of each sample, whether its last frame is given beside the first.
        """
        num_frames = (latents.shape[2] - 1) * FRAMES_PER_LATENT + 1
        masks = [given_frames_mask(num_frames, *latents.shape[-2:], with_last=last) for last in with_last]
        return torch.cat([torch.stack(masks).to(latents.device), self.normalise(latents)], dim=1)

    def _video(self, frames: NDArray[np.uint8]) -> Tensor:
        """Return [B, 3, F, H, W] in [-1, 1] on the device."""
        return torch.from_numpy(frames).to(self.device).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)

    def _mean(self, video: Tensor) -> Tensor:
        return self.vae.encode(video.to(self.vae.dtype)).latent_dist.mode()

    def normalise(self, latents: Tensor) -> Tensor:
        """Return VAE latents moved to zero mean and unit variance per channel, same shape, fp32."""
        # Times the reciprocal, not divided: the official code and diffusers round this way.
        return (latents.float() - self.latents_mean) * (1.0 / self.latents_std)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return text embeddings, [B, 512, D] on the device, zero after each prompt's true length.

        Source: `WanPipeline.encode_prompt` of diffusers, called and not written again.
        """
        embeds, _ = self.text_pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TEXT_TOKENS,
            device=self.device,
        )
        return embeds


def load_encoders(
    pipeline_dir: Path,
    device: torch.device,
    text_dtype: torch.dtype,
    *,
    vae_config: Mapping[str, Any] | None = None,
    with_text: bool = True,
) -> Encoders:
    """Return the VAE (fp32) and text encoder of a diffusers pipeline folder, frozen, on `device`.

    Args:
        pipeline_dir: diffusers folder; parts that are not loaded may be missing.
        device: where encoding happens.
        text_dtype: dtype in which the text encoder computes.
        vae_config: configuration of the VAE that made cached latents; the VAE itself is then not loaded.
        with_text: load the text encoder.
    Raises:
        ModelError: a part is missing or cannot be loaded.
    """
    from diffusers import AutoencoderKLWan

    vae: Any = None
    if vae_config is None:
        vae = _part(pipeline_dir, "vae", AutoencoderKLWan.from_pretrained, dtype=torch.float32).to(device).eval()
        vae.requires_grad_(False)
    config: Mapping[str, Any] = vae.config if vae_config is None else vae_config

    def statistics(name: str) -> Tensor:
        return torch.tensor(config[name], dtype=torch.float32, device=device).view(1, -1, 1, 1, 1)

    stride = int(config["scale_factor_temporal"]), int(config["scale_factor_spatial"])
    pipeline = _text_pipeline(pipeline_dir, device, text_dtype) if with_text else None
    return Encoders(vae, pipeline, statistics("latents_mean"), statistics("latents_std"), device, stride)


def _text_pipeline(pipeline_dir: Path, device: torch.device, dtype: torch.dtype) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    text_encoder = _part(pipeline_dir, "text_encoder", UMT5EncoderModel.from_pretrained, dtype=dtype)
    text_encoder = text_encoder.to(device).eval()
    text_encoder.requires_grad_(False)
    tokenizer = _part(pipeline_dir, "tokenizer", AutoTokenizer.from_pretrained)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=scheduler)  # type: ignore[arg-type]


def _part(pipeline_dir: Path, name: str, load: Any, **options: Any) -> Any:
    folder = pipeline_dir / name
    if not folder.is_dir():
        raise ModelError(f"{folder}: missing; {pipeline_dir} is not a WAN pipeline in diffusers layout.")
    try:
        return load(str(folder), local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}).") from error
