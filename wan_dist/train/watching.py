"""From a configuration to what watches a run: reports, averages, held-out losses, samples."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import ConfigError
from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.models.wan.transformer import read_transformer_config
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel.dist import Ranks
from wan_dist.train.averages import Average, ExponentialAverage, ScheduleFreeAverage
from wan_dist.train.build_data import open_encoders, open_validation
from wan_dist.train.engines import DTYPES
from wan_dist.train.experts import Expert, sigma_range
from wan_dist.train.loop import Hook, StepResult, TrainState
from wan_dist.train.report_sinks import load_wandb
from wan_dist.train.reports import ReportHook
from wan_dist.train.samples import SampleHook, SampleJob, SampleShape, build_pipeline, load_scheduler
from wan_dist.train.throughput import Throughput, known_peak_tflops
from wan_dist.train.validation import HeldOutClip, ValidationHook, encode_held_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """What is encoded once, before the engines are there, and kept on the host.

    Attributes:
        clips: this rank's held-out clips and whether each counts.
        jobs: videos to draw.
        negative_embeds: what guidance leads away from.
    """

    clips: list[tuple[HeldOutClip, bool]] = field(default_factory=list)
    jobs: list[SampleJob] = field(default_factory=list)
    negative_embeds: Tensor | None = None


class AverageHook:
    """Takes every step's weights into its component's average."""

    def __init__(self, averages: Mapping[str, Average]) -> None:
        """Remember the averages by component."""
        self._averages = averages

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Update the average of what the step trained."""
        if not result.skipped and result.component in self._averages:
            self._averages[result.component].update(state.component_steps[result.component])


def check_watching(cfg: TrainConfig) -> None:
    """Return if what the log and samples sections name is there.

    Raises:
        ConfigError: wandb, the prompts' file or an image is not.
    """
    if cfg.log.wandb_project:
        load_wandb()
    if not cfg.samples.every:
        return
    for path in [cfg.samples.prompts_file, *cfg.samples.images]:
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"samples: {path} is not a file; give a path from the folder in which this runs.")
    prompts = _prompts(cfg)
    if cfg.samples.images and len(prompts) != len(cfg.samples.images):
        raise ConfigError(f"samples.images has {len(cfg.samples.images)} files for {len(prompts)} prompts; one each.")


def open_reports(
    cfg: TrainConfig,
    ranks: Ranks,
    components: Sequence[str],
    on_step: Callable[[TrainState, float | None], None],
) -> ReportHook:
    """Return what reports on a run.

    Args:
        cfg: a loaded configuration.
        ranks: this process's place.
        components: what the run trains.
        on_step: drives a progress bar.
    """
    variant = get_variant(cfg.model.variant)
    configs = {}
    for component in components:
        # All transformers of a variant have one shape; an embedding is trained through any of them.
        folder = Path(cfg.model.path) / (component if component.startswith("transformer") else "transformer")
        configs[component] = read_transformer_config(folder, variant)
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    throughput = Throughput(
        configs,
        all_weights=cfg.method.kind == "full",
        checkpointing=cfg.train.gradient_checkpointing,
        peak_tflops=cfg.log.peak_tflops or known_peak_tflops(name),
    )
    return ReportHook(
        Path(cfg.run_dir),
        ranks,
        every=cfg.log.every,
        num_steps=cfg.train.num_steps,
        tensorboard=cfg.log.tensorboard,
        on_step=on_step,
        throughput=throughput,
        wandb_project=cfg.log.wandb_project,
        config=cfg.model_dump(mode="json"),
    )


def encode_watched(cfg: TrainConfig, ranks: Ranks) -> Encoded:
    """Return held-out clips and prompts, encoded; the encoders are gone when it returns."""
    dataset = open_validation(cfg)
    draws = cfg.samples.every > 0
    if dataset is None and not draws:
        return Encoded()
    encoders = open_encoders(cfg, ranks, DTYPES[cfg.model.dtype], vae_config=None, with_text=True)
    clips: list[tuple[HeldOutClip, bool]] = []
    if dataset is not None:
        needs_condition = get_variant(cfg.model.variant).needs_condition
        most = cfg.validation.max_clips
        clips = encode_held_out(dataset, encoders, ranks, max_clips=most, with_condition=needs_condition)
        dataset.close()
        logger.info("validation: %d held-out clips on this rank", sum(counts for _, counts in clips))
    if not draws:
        return Encoded(clips)
    jobs = [
        SampleJob(number, prompt, encoders.encode_prompts([prompt])[0].cpu(), image, cfg.samples.seed + number)
        for number, (prompt, image) in enumerate(zip(_prompts(cfg), _images(cfg), strict=True))
    ]
    return Encoded(clips, jobs, encoders.encode_prompts([cfg.samples.negative_prompt])[0].cpu())


def build_averages(cfg: TrainConfig, engines: Mapping[str, Any], ranks: Ranks) -> dict[str, Average]:
    """Return the averages of a run by component, started from the engines' weights; empty if it keeps none."""
    if cfg.optim.name == "schedule_free" and cfg.parallel.zero_stage > 0:
        return {component: ScheduleFreeAverage(engine) for component, engine in engines.items()}
    if not cfg.train.ema_decay:
        return {}
    device = torch.device("cpu") if cfg.train.ema_device == "cpu" else ranks.device
    return {component: ExponentialAverage(engine, cfg.train.ema_decay, device) for component, engine in engines.items()}


def watching_hooks(
    cfg: TrainConfig,
    ranks: Ranks,
    experts: Sequence[Expert],
    averages: Mapping[str, Average],
    encoded: Encoded,
    reports: ReportHook,
) -> list[Hook]:
    """Return what happens after steps beside reports and checkpoints; averages first, which the others use."""
    hooks: list[Hook] = [AverageHook(averages)] if averages else []
    if encoded.clips:
        hooks.append(_validation(cfg, ranks, experts, averages, encoded, reports))
    if encoded.jobs:
        hooks.append(_samples(cfg, ranks, experts, averages, encoded, reports))
    return hooks


def _validation(
    cfg: TrainConfig,
    ranks: Ranks,
    experts: Sequence[Expert],
    averages: Mapping[str, Average],
    encoded: Encoded,
    reports: ReportHook,
) -> ValidationHook:
    variant = get_variant(cfg.model.variant)
    whole = SigmaSampler(shift=variant.flow_shift)
    ranges = [sigma_range(variant, expert.name) for expert in experts]
    return ValidationHook(
        encoded.clips,
        experts,
        [whole.within(*bounds) for bounds in ranges],
        [whole.cdf(high) - whole.cdf(low) for low, high in ranges],
        ranks,
        reports,
        every=cfg.validation.every,
        num_steps=cfg.train.num_steps,
        num_sigmas=cfg.validation.num_sigmas,
        averages=averages,
    )


def _samples(
    cfg: TrainConfig,
    ranks: Ranks,
    experts: Sequence[Expert],
    averages: Mapping[str, Average],
    encoded: Encoded,
    reports: ReportHook,
) -> SampleHook:
    from diffusers import AutoencoderKLWan

    variant, samples, model = get_variant(cfg.model.variant), cfg.samples, Path(cfg.model.path)
    width, height = _size(cfg)
    scales = variant.guidance_scales
    shape = SampleShape(
        width,
        height,
        samples.num_frames or cfg.data.num_frames[0],
        cfg.data.fps,
        samples.num_inference_steps or variant.num_inference_steps,
        scales if samples.guidance_scale is None else (samples.guidance_scale,) * len(scales),
    )
    vae: Any = AutoencoderKLWan.from_pretrained(str(model / "vae"), dtype=torch.float32, local_files_only=True)
    engines = {expert.component: expert.engine for expert in experts}
    pipeline = build_pipeline(
        {component: engine.module for component, engine in engines.items()},
        vae.eval(),
        load_scheduler(model, variant),
        variant,
        with_image=encoded.jobs[0].image is not None,
    )
    assert encoded.negative_embeds is not None
    return SampleHook(
        encoded.jobs,
        encoded.negative_embeds,
        shape,
        pipeline,
        engines,
        averages if samples.use_average else {},
        ranks,
        reports,
        Path(cfg.run_dir) / "samples",
        every=samples.every,
    )


def _prompts(cfg: TrainConfig) -> list[str]:
    prompts = list(cfg.samples.prompts)
    if cfg.samples.prompts_file:
        lines = Path(cfg.samples.prompts_file).read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"samples.prompts_file = {cfg.samples.prompts_file}: holds no prompt.")
    return prompts


def _images(cfg: TrainConfig) -> list[Image.Image | None]:
    if not cfg.samples.images:
        return [None] * len(_prompts(cfg))
    upright = (ImageOps.exif_transpose(Image.open(path)) for path in cfg.samples.images)  # as clips are read
    return [ImageOps.fit(image.convert("RGB"), _size(cfg)) for image in upright]


def _size(cfg: TrainConfig) -> tuple[int, int]:
    return cfg.samples.size or cfg.data.sizes[0]
