"""From a configuration to what watches a run: reports, held-out losses, averages, samples."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from wan_dist.config.schema import TrainConfig
from wan_dist.models.wan.transformer import read_transformer_config
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel.dist import Ranks
from wan_dist.train.loop import TrainState
from wan_dist.train.report_sinks import load_wandb
from wan_dist.train.reports import ReportHook
from wan_dist.train.throughput import Throughput, known_peak_tflops


def check_watching(cfg: TrainConfig) -> None:
    """Return if what the log section asks for is installed.

    Raises:
        ConfigError: wandb is not.
    """
    if cfg.log.wandb_project:
        load_wandb()


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
