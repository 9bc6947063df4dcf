"""`wan-dist config`: look at, check and describe training configs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from wan_dist.config.check import check_paths
from wan_dist.config.document import dump_config, json_schema
from wan_dist.config.load import load_config

app = typer.Typer(no_args_is_help=True, help="Show, check and describe training configs.", rich_markup_mode=None)

_EXAMPLE = "configs/train/ti2v-5b.yaml"

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides such as train.num_steps=10.", show_default=False),
]


@app.command(epilog=f"Example: wan-dist config show {_EXAMPLE} train.num_steps=10")
def show(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print a config as a run would see it: defaults written out, overrides applied."""
    cfg = load_config(config, overrides or ())
    typer.echo(json.dumps(cfg.model_dump(mode="json"), indent=2) if as_json else dump_config(cfg), nl=as_json)


@app.command(epilog=f"Example: wan-dist config validate {_EXAMPLE} data.num_frames='[49]'")
def validate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    paths: Annotated[
        bool, typer.Option("--paths", help="Also check that the model folder and the shards are there.")
    ] = False,
) -> None:
    """Check a config and name everything that is wrong with it."""
    cfg = load_config(config, overrides or ())
    if paths:
        check_paths(cfg)
    typer.echo(f"{config}: valid")


@app.command(epilog="Example: wan-dist config schema > configs/train.schema.json")
def schema() -> None:
    """Print the JSON Schema of a training config, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))
