"""`wan-dist embedding`: trained words."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Export trained words.")


@app.callback()
def _root() -> None:
    """Keep `export` a verb of its own while it is the only one."""


@app.command(epilog="Example: wan-dist embedding export runs/fox fox.safetensors")
def export(
    source: Annotated[Path, typer.Argument(help="Run folder (its newest whole checkpoint) or checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="File to make.")],
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Dtype of the vectors.")] = "fp32",
    ema: Annotated[bool, typer.Option("--ema", help="Take the running average instead of the last vectors.")] = False,
) -> None:
    """Write the word that a run trained, for ComfyUI's models/embeddings and for wan-dist generate --embedding."""
    from wan_dist.io.component_weights import find_checkpoint
    from wan_dist.io.embedding_export import export_word
    from wan_dist.io.safetensors_stream import DTYPES
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    typer.echo(export_word(find_checkpoint(source), out, dtype=DTYPES[dtype], ema=ema))
