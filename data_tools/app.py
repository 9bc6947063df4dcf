"""The `wan-data` command line."""

from typing import Final

import typer

from data_tools.cache import cache
from data_tools.index import index
from data_tools.inspect_shards import inspect
from data_tools.pack import pack
from data_tools.preview import preview
from data_tools.verify import verify

app: Final = typer.Typer(
    help="Prepare clips for training with wan_dist.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(pack)
app.command()(cache)
app.command()(index)
app.command()(inspect)
app.command()(preview)
app.command()(verify)
