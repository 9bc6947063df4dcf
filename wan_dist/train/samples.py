"""Videos drawn in the middle of training, by diffusers' own pipelines around the engines' modules."""

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wan_dist.models.wan.variants import WanVariant
from wan_dist.parallel.dist import Ranks
from wan_dist.sample.video import write_mp4
from wan_dist.train.averages import Average, averaged_weights
from wan_dist.train.loop import StepResult, TrainState
from wan_dist.train.reports import ReportHook
from wan_dist.train.validation import evaluating

logger = logging.getLogger(__name__)

_STRIP_FRAMES = 8


@dataclass(frozen=True)
class SampleJob:
    """A video to draw.

    Attributes:
        number: its place in the list, which its file is named by.
        prompt: what it shows.
        text_embeds: [512, D] on the host.
        image: its given first frame; None for text to video.
        seed: of its noise.
    """

    number: int
    prompt: str
    text_embeds: Tensor
    image: Image.Image | None
    seed: int


@dataclass(frozen=True)
class SampleShape:
    """What all videos have in common.

    Attributes:
        width: px.
        height: px.
        num_frames: 4n+1.
        fps: of the files.
        num_inference_steps: denoising steps.
        guidance_scales: one per expert; 1 is no guidance.
    """

    width: int
    height: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scales: tuple[float, ...]


def load_scheduler(model: Path, variant: WanVariant) -> Any:
    """Return the scheduler of a pipeline folder, at the variant's official shift."""
    import diffusers

    config: Any = diffusers.UniPCMultistepScheduler.load_config(str(model / "scheduler"), local_files_only=True)
    scheduler_class = getattr(diffusers, config["_class_name"])
    key = "flow_shift" if "flow_shift" in config else "shift"
    return scheduler_class.from_config({**config, key: variant.flow_shift})


def build_pipeline(
    modules: Mapping[str, Any], vae: Any, scheduler: Any, variant: WanVariant, *, with_image: bool
) -> Any:
    """Return diffusers' pipeline around transformers that may be partitioned, without a text encoder.

    Args:
        modules: transformer by diffusers folder.
        vae: diffusers VAE.
        scheduler: diffusers scheduler.
        variant: gives boundary and the kind of timestep.
        with_image: videos start from given first frames.
    """
    from diffusers import WanImageToVideoPipeline, WanPipeline

    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": vae,
        "scheduler": scheduler,
        "transformer": modules["transformer"],
        "transformer_2": modules.get("transformer_2"),
        "boundary_ratio": variant.boundary,
        "expand_timesteps": variant.per_token_timestep,
    }
    pipeline = WanImageToVideoPipeline(**parts) if with_image else WanPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class SampleHook:
    """Every `every` steps draws the videos, one per rank or sequence group at a time.

    Collective, since all gather the same weights.
    """

    def __init__(
        self,
        jobs: Sequence[SampleJob],
        negative_embeds: Tensor,
        shape: SampleShape,
        pipeline: Any,
        engines: Mapping[str, Any],
        averages: Mapping[str, Average],
        ranks: Ranks,
        reports: ReportHook,
        folder: Path,
        *,
        every: int,
    ) -> None:
        """Remember what to draw.

        Args:
            jobs: all videos, the same list on every rank.
            negative_embeds: [512, D], what guidance leads away from.
            shape: of all videos.
            pipeline: from `build_pipeline`, around the engines' modules.
            engines: by component.
            averages: averaged weights to draw with; empty draws with the weights as they are.
            ranks: this process's place.
            reports: where strips of frames go.
            folder: the run's samples.
            every: steps between them.
        """
        self._jobs, self._negative, self._shape, self._pipeline = jobs, negative_embeds, shape, pipeline
        self._engines, self._averages, self._ranks, self._reports = engines, averages, ranks, reports
        self._folder, self._every = folder, every

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Draw when due."""
        if state.step % self._every == 0:
            self.draw(state.step)

    @torch.no_grad()
    def draw(self, step: int) -> None:
        """Draw all videos into `step-XXXXXXXX`; collective."""
        started = time.perf_counter()
        vae, ranks = self._pipeline.vae, self._ranks
        vae.to(ranks.device)
        at_once = ranks.data_world_size
        rounds = -(-len(self._jobs) // at_once)
        with averaged_weights(self._engines, self._averages), evaluating(list(self._engines.values())):
            for first in range(0, rounds * at_once, at_once):
                place = first + ranks.data_rank
                # A rank without a video draws the last one along: the others wait for its forward passes.
                job = self._jobs[min(place, len(self._jobs) - 1)]
                latents = self._latents(job)
                if place < len(self._jobs) and ranks.rank % ranks.sequence_size == 0:
                    keep_video(self._folder / f"step-{step:08d}", job, self._decode(latents), self._shape.fps)
        vae.to("cpu")
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.distributed.barrier()
        if self._ranks.is_main:
            self._report(step)
            logger.info("drew %d videos at step %d in %.1f s", len(self._jobs), step, time.perf_counter() - started)

    def _latents(self, job: SampleJob) -> Tensor:
        """Return denoised latents, normalised, [1, C, f, h, w]."""
        shape, device = self._shape, self._ranks.device
        options: dict[str, Any] = {
            "prompt_embeds": job.text_embeds[None].to(device),
            "negative_prompt_embeds": self._negative[None].to(device),
            "width": shape.width,
            "height": shape.height,
            "num_frames": shape.num_frames,
            "num_inference_steps": shape.num_inference_steps,
            "guidance_scale": shape.guidance_scales[0],
            "guidance_scale_2": shape.guidance_scales[-1] if len(shape.guidance_scales) > 1 else None,
            "generator": torch.Generator("cpu").manual_seed(job.seed),
            "output_type": "latent",
        }
        if job.image is not None:
            options["image"] = job.image
        return self._pipeline(**options).frames

    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return the video of latents, [F, H, W, 3] RGB in 0..255, as the pipelines' own last lines do."""
        vae = self._pipeline.vae
        latents = latents.to(vae.dtype)
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(latents)
        std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(latents)
        video = vae.decode(latents / std + mean, return_dict=False)[0]
        frames = self._pipeline.video_processor.postprocess_video(video, output_type="np")[0]
        return (frames * 255.0).round().clip(0, 255).astype(np.uint8)

    def _report(self, step: int) -> None:
        """Give the strips, which all ranks have written by now, to the sinks."""
        for job in self._jobs:
            path = self._folder / f"step-{step:08d}" / f"{job.number:03d}.png"
            if path.is_file():
                strip = np.asarray(Image.open(path).convert("RGB"))
                for sink in self._reports.sinks(step):
                    sink.image(f"samples/{job.number:03d}", step, strip)


def keep_video(folder: Path, job: SampleJob, frames: NDArray[np.uint8], fps: float) -> None:
    """Write a video, a strip of its frames and its prompt; on a full or broken disk warn and leave nothing.

    Args:
        folder: of the step's samples.
        job: names the files.
        frames: [F, H, W, 3] RGB in 0..255.
        fps: of the video.
    """
    video, strip, prompt = (folder / f"{job.number:03d}{suffix}" for suffix in (".mp4", ".png", ".txt"))
    shown = np.linspace(0, len(frames) - 1, min(_STRIP_FRAMES, len(frames))).round().astype(int)
    try:
        write_mp4(video, frames, fps)
        Image.fromarray(np.concatenate(list(frames[shown]), axis=1)).save(strip)
        prompt.write_text(f"{job.prompt}\n", encoding="utf-8")
    except (OSError, av.FFmpegError) as error:
        logger.warning("%s is lost: %s. Training goes on.", video, error)
        for path in (video, video.with_name(f".{video.name}.tmp"), strip, prompt):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
