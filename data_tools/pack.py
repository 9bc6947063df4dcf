"""`wan-data pack`: clips and captions to shards."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from data_tools.progress import show_progress
from wan_dist.data.pack import PackResult, pack_clips


def pack(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of clips (mp4, mkv, webm, avi, png, jpg).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards; made if missing.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines with file|video|path|file_name and caption|text|prompt. "
            "Without it, each clip needs a .txt or .json of its name."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Shards written at the same time.")] = 1,
    shard_size_mb: Annotated[int, typer.Option(min=1, help="Size at which a shard is full, MB.")] = 1000,
    shard_clips: Annotated[int, typer.Option(min=1, help="Clips at which a shard is full.")] = 10_000,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what OUT holds of an earlier, different pack.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Pack clips and captions into WebDataset shards with an index and a manifest.

    A killed run goes on where it was when the same command is given again. Clips that cannot be used are listed with
    their reason in OUT/rejects.jsonl.

    Example: `wan-data pack clips/ shards/ --captions clips/captions.jsonl --workers 4`
    """
    with show_progress() as progress:
        result = pack_clips(
            source,
            out,
            captions_path=captions,
            num_workers=workers,
            shard_bytes=shard_size_mb * 1_000_000,
            shard_clips=shard_clips,
            restart=restart,
            progress=progress,
        )
    typer.echo(json.dumps({"out": str(out), **asdict(result)}) if as_json else _describe(out, result))


def _describe(out: Path, result: PackResult) -> str:
    shards = f"{result.num_shards} shard{'s' if result.num_shards != 1 else ''}"
    lines = [f"{out}: {result.num_clips} clips in {shards}, {result.num_bytes / 1e6:.1f} MB"]
    if result.resumed_shards:
        lines.append(f"kept from an earlier run: {result.resumed_shards} of {shards}")
    if result.rejects:
        reasons = ", ".join(f"{count} {code}" for code, count in result.rejects.items())
        lines.append(f"rejected: {reasons}; see {out / 'rejects.jsonl'}")
    return "\n".join(lines)
