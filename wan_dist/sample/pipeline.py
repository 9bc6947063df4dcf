"""Videos from a pipeline folder, by diffusers' own pipelines."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wan_dist.core.errors import ModelError, RequestError


@dataclass(frozen=True)
class SampleOptions:
    """How a video is drawn.

    Attributes:
        width: px, a multiple of the variant's pixel multiple.
        height: px, likewise.
        num_frames: frames, 4n+1.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance, 1 turns it off.
        seed: seed of the initial noise.
        negative_prompt: what guidance leads away from.
    """

    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    negative_prompt: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def load_text_to_video(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Return diffusers' `WanPipeline` of a folder, on `device`; nothing is fetched from a hub.

    Raises:
        ModelError: the folder is not a text-to-video pipeline or cannot be loaded.
    """
    from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline

    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder}: no model_index.json; give a pipeline folder in diffusers layout.")
    try:
        # The VAE decodes in fp32 whatever the transformer computes in, as diffusers' examples for WAN do.
        vae = AutoencoderKLWan.from_pretrained(str(folder / "vae"), dtype=torch.float32, local_files_only=True)
        pipeline = DiffusionPipeline.from_pretrained(str(folder), vae=vae, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}).") from error
    if not isinstance(pipeline, WanPipeline):
        raise ModelError(f"{folder}: is a {type(pipeline).__name__}; a WanPipeline (text to video) is needed.")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_options(pipeline: Any, options: SampleOptions) -> None:
    """Return if the pipeline draws exactly this size and length; it would silently round them.

    Raises:
        RequestError: not a multiple, not 4n+1, or no steps.
    """
    patch = pipeline.transformer.config.patch_size if pipeline.transformer else (1, 2, 2)
    multiple = pipeline.vae_scale_factor_spatial * patch[1]
    for name in ("width", "height"):
        value = getattr(options, name)
        if value < multiple or value % multiple:
            below = max(value // multiple * multiple, multiple)
            raise RequestError(f"{name} = {value} is not a multiple of {multiple}; use {below} or {below + multiple}.")
    if options.num_frames < 1 or options.num_frames % 4 != 1:
        below = max((options.num_frames - 1) // 4 * 4 + 1, 1)
        raise RequestError(f"num_frames = {options.num_frames} is not 4n+1; use {below} or {below + 4}.")
    if options.num_inference_steps < 1:
        raise RequestError(f"num_inference_steps = {options.num_inference_steps}; use 1 or more.")


def draw_videos(
    pipeline: Any, prompts: Sequence[str], options: SampleOptions, on_step: Callable[[int], None] | None = None
) -> list[NDArray[np.uint8]]:
    """Return one video per prompt, each [F, H, W, 3] RGB in 0..255; prompt i starts from seed + i.

    Args:
        pipeline: from `load_text_to_video`.
        prompts: drawn together in one batch.
        options: the same for all.
        on_step: told the number of denoising steps done.
    """
    check_options(pipeline, options)

    def after_step(_pipeline: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if on_step:
            on_step(step + 1)
        return kwargs

    generators = [torch.Generator("cpu").manual_seed(options.seed + i) for i in range(len(prompts))]
    with torch.no_grad():
        result = pipeline(
            prompt=list(prompts),
            negative_prompt=[options.negative_prompt] * len(prompts),
            width=options.width,
            height=options.height,
            num_frames=options.num_frames,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=generators,
            output_type="np",
            callback_on_step_end=after_step,
        )
    videos = np.asarray(result.frames)
    return [(video * 255.0).round().clip(0, 255).astype(np.uint8) for video in videos]
