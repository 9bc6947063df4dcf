"""One rank of `wan-data cache`."""

from pathlib import Path

from rich.console import Console

from data_tools.cache_plan import TILES, CachePlan
from data_tools.cache_progress import Tally, show_clips
from wan_dist.cli.progress import log_as_rank, quiet_libraries
from wan_dist.data.cache import CacheStopped, FamilyPlan, write_missing
from wan_dist.data.cache_sources import LatentsSource, Source, TextSource
from wan_dist.data.encode import load_encoders
from wan_dist.parallel.dist import Ranks, ranks_from_environment
from wan_dist.parallel.shutdown import StopRequest


def run_rank(
    plan: CachePlan, stop: StopRequest, *, model: Path, dtype: str, tiling: bool, batch_size: int, num_workers: int
) -> None:
    """Write this rank's share of every family, until done or told to stop.

    Args:
        plan: what to write.
        stop: tells when to leave early.
        model: diffusers folder of the pipeline.
        dtype: dtype of the text encoder, "bf16" or "fp32".
        tiling: encode in tiles of `TILES`.
        batch_size: clips or captions per pass.
        num_workers: threads that decode.
    """
    import torch

    ranks = ranks_from_environment()
    log_as_rank(ranks.rank, "INFO", Console(stderr=True))
    quiet_libraries()
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    text_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    # One model at a time: the text encoder alone has 11 GB.
    if plan.text:
        # Text needs no VAE, and none is loaded: any numbers will do.
        config = {"latents_mean": [0.0], "latents_std": [1.0], "scale_factor_temporal": 4, "scale_factor_spatial": 8}
        encoders = load_encoders(model, ranks.device, text_dtype, vae_config=config)
        _write(plan.text, TextSource(plan.text.shards, encoders, batch_size=batch_size), ranks, stop)
        del encoders
    if plan.latents and plan.dataset and not stop.requested:
        encoders = load_encoders(model, ranks.device, text_dtype, with_text=False)
        if tiling:
            encoders.vae.enable_tiling(**TILES)
        source = LatentsSource(plan.dataset, encoders, plan.parts, batch_size=batch_size, num_workers=num_workers)
        try:
            _write(plan.latents, source, ranks, stop)
        finally:
            plan.dataset.close()


def _write(family: FamilyPlan, source: Source, ranks: Ranks, stop: StopRequest) -> None:
    total = sum(source.num_clips(shard) for shard in range(family.num_shards))
    tally = Tally(family.folder, ranks.rank)
    try:
        with show_clips(f"cache {family.kind}", total, tally, shown=ranks.is_main) as count:
            write_missing(
                family,
                source,
                rank=ranks.rank,
                world_size=ranks.world_size,
                on_clips=count,
                should_stop=lambda: stop.requested,
            )
    except CacheStopped:
        return
