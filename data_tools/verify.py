"""`wan-data verify`: are the shards what was packed, and their caches what was encoded."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from data_tools.progress import show_count
from wan_dist.core.errors import DataError
from wan_dist.core.words import counted
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.family import FAMILY_NAME, read_manifest
from wan_dist.data.index import MANIFEST_NAME, open_unchecked
from wan_dist.data.verify import Damage, verify_shards
from wan_dist.data.verify_family import verify_family


def verify(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Folder or URL of packed shards, or folder of a cached family.")
    ],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every frame of every clip too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Hash every shard and index again and count the clips; name each damaged file and sample.

    Cached families inside a local folder are verified too. The exit status is 1 if anything is damaged.

    Example: `wan-data verify shards/`
    """
    if (Path(shards) / FAMILY_NAME).exists():
        summary, damages = _family(Path(shards))
        families: list[dict[str, Any]] = []
    else:
        summary, damages = _clips(shards, decode)
        # One without a manifest has not been finished: nothing is wrong, and caching looks at it again.
        manifests = [
            path for kind in ("latents", "text") for path in sorted(Path(shards).glob(f"{kind}-*/{MANIFEST_NAME}"))
        ]
        found = [_family(path.parent) for path in manifests]
        families = [row for row, _ in found]
        damages += [damage for _, more in found for damage in more]
    if as_json:
        typer.echo(json.dumps({**summary, "families": families, "damaged": [asdict(d) for d in damages]}))
    else:
        for damage in damages:
            sample = f": sample {damage.sample}" if damage.sample else ""
            typer.echo(f"{damage.file}{sample}: {damage.what}")
        for row in (summary, *families):
            typer.echo(
                f"{row['name']}: {counted(row['clips'], 'clip')} in {counted(row['shards'], 'shard')}, "
                f"{row['bytes'] / 1e6:.1f} MB: " + (f"{row['num_damaged']} damaged" if row["num_damaged"] else "whole")
            )
    if damages:
        print("wan-data: copy the damaged shards again, or pack or cache again", file=sys.stderr)
        raise typer.Exit(1)


def _clips(shards: str, decode: bool) -> tuple[dict[str, Any], list[Damage]]:
    opened = open_unchecked(shards)
    decoder = open_decoder("process") if decode else None
    try:
        with show_count("shards") as progress:
            damages = verify_shards(opened, decoder, progress)
    finally:
        if decoder:
            decoder.close()
    return _summary(opened.name, opened.manifest, damages), damages


def _family(folder: Path) -> tuple[dict[str, Any], list[Damage]]:
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        path = folder / MANIFEST_NAME
        damage = Damage(str(path), None, str(error).removeprefix(f"{path}: "))
        return {"name": str(folder), "shards": 0, "clips": 0, "bytes": 0, "num_damaged": 1}, [damage]
    with show_count(f"shards of {folder.name}") as progress:
        damages = verify_family(folder, progress)
    return _summary(str(folder), manifest, damages), damages


def _summary(name: str, manifest: Any, damages: list[Damage]) -> dict[str, Any]:
    return {
        "name": name,
        "shards": len(manifest.shards),
        "clips": manifest.num_clips,
        "bytes": manifest.num_bytes,
        "num_damaged": len(damages),
    }
