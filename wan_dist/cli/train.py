"""`wan-dist train`: the program of one rank."""

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Examples: wan-dist train configs/train/tiny-4clips.yaml   |   "
    "torchrun --nproc_per_node 2 -m wan_dist train CONFIG   |   deepspeed --num_gpus 2 --module wan_dist train CONFIG"
)


def train(
    config: Annotated[Path, typer.Argument(help="Training config, YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Values to change, such as train.num_steps=10.", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Run one rank of a training job; a launcher starts several (see `wan-dist launch`)."""
    from rich.console import Console

    from wan_dist.cli.progress import log_as_rank, progress_bar, quiet_libraries
    from wan_dist.config.load import load_config
    from wan_dist.core.errors import WanDistError
    from wan_dist.io.run_folder import write_status
    from wan_dist.parallel.environment import prepare_environment
    from wan_dist.parallel.shutdown import StopRequest

    stop = StopRequest()
    stop.install()
    cfg = load_config(config, overrides or [])
    prepare_environment()
    from wan_dist.parallel.dist import ranks_from_environment

    ranks = ranks_from_environment()
    console = Console(stderr=True)
    log_as_rank(ranks.rank, cfg.log.level, console)
    from wan_dist.train.build import run_training
    from wan_dist.train.loop import TrainState

    quiet_libraries()
    with progress_bar(console, "{task.fields[loss]}") as progress:
        task = progress.add_task("train", total=cfg.train.num_steps, loss="") if ranks.is_main else None

        def on_step(state: TrainState, loss: float | None) -> None:
            if task is not None:
                progress.update(task, completed=state.step)
                if loss is not None:
                    progress.update(task, loss=f"loss {loss:.4f}")

        try:
            code = run_training(cfg, ranks, stop, on_step)
        except WanDistError as error:
            if ranks.is_main and Path(cfg.run_dir).is_dir():
                write_status(Path(cfg.run_dir), "failed", error=str(error))
            raise
    raise typer.Exit(code)
