"""`wan-data cache`: latents and text embeddings of packed clips, ahead of training."""

import json
import os
import sys
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from wan_dist.core.errors import ConfigError
from wan_dist.core.words import counted


class Only(StrEnum):
    """The families that can be cached alone."""

    latents = "latents"
    text = "text"


def cache(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder written by `wan-data pack`.")],
    model: Annotated[
        Path | None, typer.Option(help="Diffusers folder of the pipeline. Default: model.path of --config.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Training config whose rules apply, YAML.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over --config; repeatable.")] = None,
    only: Annotated[Only | None, typer.Option(help="Cache one family alone.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant that will be trained, without --config.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="Spatial bucket WIDTHxHEIGHT px; repeatable.")] = None,
    num_frames: Annotated[list[int] | None, typer.Option(help="Temporal bucket, 4n+1 frames; repeatable.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second that clips are resampled to.")] = None,
    frame_choice: Annotated[str, typer.Option(help="Part of a longer clip: head or center.")] = "head",
    allow_upscale: Annotated[
        bool, typer.Option("--allow-upscale", help="Use clips smaller than their bucket.")
    ] = False,
    allow_duplicate_frames: Annotated[
        bool, typer.Option("--allow-duplicate-frames", help="Use clips of too low a frame rate.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Dtype of the text encoder without --config: bf16 or fp32.")] = "bf16",
    tiling: Annotated[bool, typer.Option("--tiling", help="Encode in tiles: less memory, other numbers.")] = False,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Clips or captions per pass. 1 gives online training's numbers to the last bit.")
    ] = 1,
    num_workers: Annotated[int, typer.Option(min=1, help="Threads per rank that decode.")] = 2,
    num_gpus: Annotated[
        int, typer.Option("--num-gpus", min=0, help="Ranks to start; 0 takes every GPU. Without a GPU: CPU ranks.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Encode clips and captions once, so that training loads neither VAE nor text encoder.

    Writes SHARDS/latents-FINGERPRINT and SHARDS/text-FINGERPRINT, which training finds by itself. A killed run goes on
    where it was; finished shards are verified. Started by a launcher (RANK is set), it is one of its ranks.

    Example: `wan-data cache shards/ --model models/wan22-ti2v-5b --config train.yaml --num-gpus 8`
    """
    from data_tools import cache_plan

    if "RANK" in os.environ:
        from wan_dist.cli.progress import log_as_rank

        log_as_rank(int(os.environ["RANK"]), "INFO")
    if config is not None:
        if variant or size or num_frames or fps is not None:
            raise ConfigError("--config holds the rules; change them with --set data.sizes=... instead of flags.")
        rules, model_path = cache_plan.rules_from_config(config, overrides or [])
        model = model or Path(model_path)
    else:
        others = {
            "dtype": dtype,
            "frame_choice": frame_choice,
            "crop": "center",
            "allow_upscale": allow_upscale,
            "allow_duplicate_frames": allow_duplicate_frames,
        }
        rules = cache_plan.rules_from_options(variant, size or [], num_frames or [], fps, others)
    if model is None:
        raise ConfigError("no model: give --model DIR, or --config with model.path.")
    plan = cache_plan.make_plan(shards, model, rules, only=only, tiling=tiling)
    if dry_run:
        _print_plan(plan, rules, as_json)
        return
    work = {
        "model": model,
        "dtype": rules.dtype,
        "tiling": tiling,
        "batch_size": batch_size,
        "num_workers": num_workers,
    }
    if "RANK" in os.environ:
        _run_as_rank(plan, work)
    else:
        _run_all(plan, work, num_gpus, as_json)


def _run_all(plan: Any, work: dict[str, Any], num_gpus: int, as_json: bool) -> None:
    """Start the ranks, or be the only one, and say what was made."""
    from data_tools.cache_plan import describe
    from data_tools.cache_progress import clear_tallies
    from wan_dist.data.cache import exclusive, finish
    from wan_dist.parallel.launch import visible_devices

    with ExitStack() as stack:
        for family in plan.families:
            stack.enter_context(exclusive(family))
            clear_tallies(family.folder)
        before = {family.kind: describe(family)["finished_shards"] for family in plan.families}
        devices = visible_devices(num_gpus)
        status = _launch(devices) if len(devices) > 1 else _run_as_rank(plan, work)
        for family in plan.families:
            clear_tallies(family.folder)
        if status:
            raise typer.Exit(status)
        manifests = [finish(family) for family in plan.families]
    rows = []
    for family, manifest in zip(plan.families, manifests, strict=True):
        assert manifest is not None, f"{family.folder} is unfinished though every rank ended well"
        counts = {"num_clips": manifest.num_clips, "num_bytes": manifest.num_bytes, "rejects": manifest.rejects}
        rows.append({**describe(family), **counts, "resumed_shards": before[family.kind]})
    if as_json:
        typer.echo(json.dumps({"families": rows}))
        return
    for row in rows:
        kept = f", {row['resumed_shards']} kept from an earlier run" if row["resumed_shards"] else ""
        rejects = "".join(f", {count} {why}" for why, count in row["rejects"].items())
        typer.echo(
            f"{row['folder']}: {counted(row['num_clips'], 'clip')} in {counted(row['num_shards'], 'shard')}{kept}, "
            f"{row['num_bytes'] / 1e6:.1f} MB{rejects}"
        )


def _launch(devices: list[str]) -> int:
    """Run this command's own arguments on one rank per device; return the exit status."""
    from wan_dist.parallel.environment import prepare_environment
    from wan_dist.parallel.launch import deepspeed_command, free_port, rank_threads, run_ranks

    prepare_environment()
    command = deepspeed_command(devices, ["data_tools", *sys.argv[1:]], port=free_port())
    return run_ranks(command, env={"OMP_NUM_THREADS": str(rank_threads(len(devices))), **os.environ})


def _run_as_rank(plan: Any, work: dict[str, Any]) -> int:
    """Write this rank's share; return the exit status, that of a signal if one came."""
    from data_tools.cache_rank import run_rank
    from wan_dist.parallel.shutdown import StopRequest

    stop = StopRequest()
    stop.install()
    run_rank(plan, stop, **work)
    if stop.requested:
        raise typer.Exit(stop.exit_code())
    return 0


def _print_plan(plan: Any, rules: Any, as_json: bool) -> None:
    from data_tools.cache_plan import describe, estimate_bytes

    rows = [describe(family) for family in plan.families]
    size = estimate_bytes(plan, rules.variant) if plan.latents else None
    if as_json:
        typer.echo(json.dumps({"families": rows, "latents_bytes": size}))
        return
    if plan.dataset:
        typer.echo(plan.dataset.table())
    for row in rows:
        about = f", about {size / 1e9:.2f} GB" if size and row["kind"] == "latents" else ""
        typer.echo(f"{row['folder']}: {row['finished_shards']} of {row['num_shards']} shards are finished{about}")
