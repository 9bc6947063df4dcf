"""`wan-dist consolidate`: sharded checkpoints into weights that people load."""

from pathlib import Path
from typing import Annotated, Literal

import typer

EPILOG = "Example: wan-dist consolidate quickstart/run export/quickstart --format diffusers"


def consolidate(
    source: Annotated[Path, typer.Argument(help="Run folder (its newest whole checkpoint) or checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    layout: Annotated[Literal["diffusers"], typer.Option("--format", help="Layout of the result.")] = "diffusers",
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the written weights.")] = "bf16",
    max_shard_gb: Annotated[float, typer.Option(min=0.001, help="Size at which a new weight file begins, GB.")] = 5.0,
) -> None:
    """Write the fp32 master weights of a checkpoint as a pipeline folder, without a GPU or the model."""
    from rich.console import Console

    from wan_dist.cli.progress import ByteProgress, progress_bar
    from wan_dist.io.consolidate import DTYPES, FORMATS, Progress, find_checkpoint
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    checkpoint = find_checkpoint(source)
    with progress_bar(Console(stderr=True)) as bar:
        told = ByteProgress(bar, f"consolidate step {checkpoint.step}")
        written = FORMATS[layout](
            checkpoint,
            out,
            dtype=DTYPES[dtype],
            max_shard_bytes=int(max_shard_gb * 1e9),
            progress=Progress(told.start, told.advance),
        )
    typer.echo(written)
