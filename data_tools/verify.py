"""`wan-data verify`: are the shards what was packed."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from data_tools.progress import show_count
from wan_dist.core.words import counted
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.index import open_shards
from wan_dist.data.verify import verify_shards


def verify(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder or URL of packed shards.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every frame of every clip too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Hash every shard and index again and count the clips; name each damaged file and sample.

    The exit status is 1 if anything is damaged.

    Example: `wan-data verify shards/`
    """
    opened = open_shards(shards)
    decoder = open_decoder("process") if decode else None
    try:
        with show_count("shards") as progress:
            damages = verify_shards(opened, decoder, progress)
    finally:
        if decoder:
            decoder.close()
    manifest = opened.manifest
    if as_json:
        summary = {"shards": len(manifest.shards), "clips": manifest.num_clips, "bytes": manifest.num_bytes}
        typer.echo(json.dumps({**summary, "damaged": [asdict(d) for d in damages]}))
    else:
        for damage in damages:
            sample = f": sample {damage.sample}" if damage.sample else ""
            typer.echo(f"{damage.file}{sample}: {damage.what}")
        state = f"{len(damages)} damaged" if damages else "whole"
        typer.echo(
            f"{opened.name}: {counted(manifest.num_clips, 'clip')} in {counted(len(manifest.shards), 'shard')}, "
            f"{manifest.num_bytes / 1e6:.1f} MB: {state}"
        )
    if damages:
        print("wan-data: copy the damaged shards again or pack again", file=sys.stderr)
        raise typer.Exit(1)
