"""`wan-dist consolidate`: sharded checkpoints into weights that people load."""

from pathlib import Path
from typing import Annotated, Literal

import typer

EPILOG = "Example: wan-dist consolidate quickstart/run export/quickstart --format diffusers"


def consolidate(
    source: Annotated[Path, typer.Argument(help="Run folder (its newest whole checkpoint) or checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    layout: Annotated[
        Literal["diffusers", "original", "comfyui"], typer.Option("--format", help="Layout of the result.")
    ] = "diffusers",
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the written weights.")] = "bf16",
    max_shard_size: Annotated[
        str, typer.Option(help="Size at which a new weight file begins, such as 5GB or 500MB.")
    ] = "5GB",
    expert: Annotated[
        Literal["high_noise", "low_noise"] | None,
        typer.Option(help="Only this expert; all that were trained otherwise."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the running average instead of the last weights.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say the size, write nothing.")] = False,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="Read a checkpoint that no run of yours wrote: it can run code.")
    ] = False,
    merge_lora: Annotated[
        bool, typer.Option("--merge-lora", help="Add the LoRA that was trained to the weights it was trained on.")
    ] = False,
) -> None:
    """Write the fp32 master weights of a checkpoint as other programs load them, without a GPU or the model.

    diffusers: a whole pipeline folder. original: the official repository's folders. comfyui: a file per expert.
    """
    from rich.console import Console

    from wan_dist.cli.progress import ByteProgress, progress_bar, told_size
    from wan_dist.cli.sizes import bytes_of
    from wan_dist.io.component_weights import find_checkpoint
    from wan_dist.io.consolidate import Progress
    from wan_dist.io.consolidate import consolidate as write
    from wan_dist.io.safetensors_stream import DTYPES
    from wan_dist.parallel.environment import prepare_environment

    max_shard_bytes = bytes_of(max_shard_size, "--max-shard-size")
    prepare_environment()
    checkpoint = find_checkpoint(source, trusted=trust_checkpoint)
    with progress_bar(Console(stderr=True)) as bar:
        told = ByteProgress(bar, f"consolidate step {checkpoint.step}")
        written = write(
            checkpoint,
            out,
            layout=layout,
            dtype=DTYPES[dtype],
            max_shard_bytes=max_shard_bytes,
            progress=Progress(told_size if dry_run else told.start, told.advance),
            expert=expert,
            ema=ema,
            merge_lora=merge_lora,
            dry_run=dry_run,
        )
    typer.echo(written)
