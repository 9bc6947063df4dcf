"""The `wan-dist` command: one module per verb, each listed here.

A verb's module imports torch and other heavy packages inside its functions only, so that `--help` is instant.
"""

from importlib import metadata
from typing import Annotated

import typer

from wan_dist.cli import checkpoint, config, consolidate, embedding, generate, launch, lora, models, quickstart, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train WAN 2.2 video diffusion models with DeepSpeed ZeRO-3.",
    epilog="Example: wan-dist config validate configs/train/ti2v-5b.yaml",
)

app.add_typer(config.app, name="config")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(models.app, name="models")
app.add_typer(lora.app, name="lora")
app.add_typer(embedding.app, name="embedding")
app.command(epilog=quickstart.EPILOG)(quickstart.quickstart)
app.command(epilog=train.EPILOG)(train.train)
app.command(epilog=launch.EPILOG)(launch.launch)
app.command(epilog=consolidate.EPILOG)(consolidate.consolidate)
app.command(epilog=generate.EPILOG)(generate.generate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"wan-dist {metadata.version('wan_dist')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that come before the verb."""
