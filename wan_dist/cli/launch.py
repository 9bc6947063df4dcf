"""`wan-dist launch`: start the ranks of this machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

# Ranks that cannot go on end themselves and say where they stood; only then are they killed.
_RANKS_END_FIRST_S = 10.0

EPILOG = "Example: wan-dist launch configs/train/tiny-4clips.yaml --num-gpus 2 train.num_steps=10"


def launch(
    config: Annotated[Path, typer.Argument(help="Training config, YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to change, such as train.num_steps=10.", metavar="[KEY=VALUE]...")
    ] = None,
    num_gpus: Annotated[
        int, typer.Option("--num-gpus", min=0, help="Ranks to start; 0 takes every GPU. Without a GPU: CPU ranks.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the config, print the command and stop.")] = False,
) -> None:
    """Train on this machine: one rank per GPU through the DeepSpeed launcher, all ended together."""
    import time

    from wan_dist.config.check import check_paths
    from wan_dist.config.load import load_config
    from wan_dist.core.errors import LaunchError
    from wan_dist.io.checkpoint import bytes_under_way
    from wan_dist.io.run_folder import checkpoints_dir, mark_failed
    from wan_dist.parallel.ds_config import accumulation_steps
    from wan_dist.parallel.environment import prepare_environment
    from wan_dist.parallel.launch import deepspeed_command, free_port, rank_threads, run_ranks, visible_devices

    cfg = load_config(config, overrides or [])
    if not dry_run:
        check_paths(cfg)
    prepare_environment()
    devices = visible_devices(num_gpus)
    accumulation_steps(cfg.train.global_batch_size, cfg.train.micro_batch_size, len(devices))
    command = deepspeed_command(devices, ["wan_dist", "train", str(config), *(overrides or [])], port=free_port())
    if dry_run:
        import shlex

        typer.echo(shlex.join(command))
        return
    env = {"OMP_NUM_THREADS": str(rank_threads(len(devices))), **os.environ}
    started, status = time.time(), 1
    try:
        status = run_ranks(
            command,
            env=env,
            grace_s=cfg.checkpoint.grace_s + _RANKS_END_FIRST_S,
            progress=lambda: bytes_under_way(checkpoints_dir(Path(cfg.run_dir))) or None,
        )
    except LaunchError as error:
        # The others only know that a rank does not answer.
        mark_failed(Path(cfg.run_dir), str(error), error.exit_code, known_better_since=started)
        raise
    finally:
        # Nothing runs any more: a rank that was killed could not say so itself.
        if status:
            mark_failed(Path(cfg.run_dir), "the job ended before the run could say why", status)
    raise typer.Exit(status)
