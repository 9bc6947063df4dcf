"""`wan-dist train`: the program of one rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from wan_dist.parallel.shutdown import StopRequest

# Other ranks may be slower to reach the same mistake, and the launcher looks at its ranks once a second.
_MAIN_SPEAKS_WITHIN_S = 30.0

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
    from wan_dist.parallel.shutdown import StopRequest

    stop = StopRequest()
    stop.install()
    with _said_once(stop):
        code = _train(config, overrides or [], stop)
    raise typer.Exit(code)


@contextmanager
def _said_once(stop: "StopRequest") -> Iterator[None]:
    """Leave what is wrong on every rank to rank 0, whose end makes the launcher stop the others."""
    from wan_dist.core.errors import WanDistError

    try:
        yield
    except WanDistError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0:
            raise
        if stop.wait(_MAIN_SPEAKS_WITHIN_S):
            raise typer.Exit(error.exit_code) from None
        told = type(error)(f"rank {rank}: {error}")
        told.exit_code = error.exit_code
        raise told from error


def _train(config: Path, overrides: list[str], stop: "StopRequest") -> int:
    from rich.console import Console

    from wan_dist.cli.progress import log_as_rank, progress_bar, quiet_libraries
    from wan_dist.config.load import load_config
    from wan_dist.io.run_folder import mark_failed
    from wan_dist.parallel.environment import prepare_environment

    cfg = load_config(config, overrides)
    stop.grace_s = cfg.checkpoint.grace_s
    prepare_environment()
    from wan_dist.parallel.dist import ranks_from_environment

    ranks = ranks_from_environment()
    if ranks.is_main:
        stop.before_force = lambda why: mark_failed(Path(cfg.run_dir), why, stop.exit_code())
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

        return run_training(cfg, ranks, stop, on_step)
