"""`wan-data index`: make tars of other programs readable at random."""

import json
from pathlib import Path
from typing import Annotated

import typer

from data_tools.progress import show_count
from wan_dist.core.words import counted
from wan_dist.data.reindex import index_folder


def index(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder of WebDataset tars.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write an index for each tar of another program, and a manifest; the tars stay as they are.

    Every clip is probed and every byte read once. Samples without a caption or a usable clip are left out and listed
    in SHARDS/rejects.jsonl.

    Example: `wan-data index laion-videos/`
    """
    with show_count("tars") as progress:
        manifest = index_folder(shards, progress)
    if as_json:
        typer.echo(
            json.dumps({"clips": manifest.num_clips, "shards": len(manifest.shards), "rejects": manifest.rejects})
        )
        return
    rejects = ", ".join(f"{count} {code}" for code, count in manifest.rejects.items()) or "none"
    found = f"{counted(manifest.num_clips, 'clip')} in {counted(len(manifest.shards), 'tar')}"
    typer.echo(f"{shards}: {found}; left out: {rejects}")
