"""`wan-data pack`: clips and captions to shards."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_tools.progress import show_progress
from wan_dist.core.words import counted
from wan_dist.data.pack import PackResult, pack_clips
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.pack_state import REJECTS_NAME, WARNINGS_NAME

_CHECKS, _CUTS, _FILTERS = "Checks", "Cutting and encoding", "Filters"


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder of clips (mp4, mkv, webm, avi, ts, png, jpg, webp), or a table or tar."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards; made if missing.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Table (csv, tsv, json, jsonl, parquet) with file|video|video_path|path|file_name and "
            "caption|text|prompt. Without it, metadata.* in SRC, or a .txt or .json beside each clip."
        ),
    ] = None,
    source_format: Annotated[
        Literal["auto", "sidecars", "table", "lists", "tars", "concepts"],
        typer.Option("--format", help="How SRC keeps clips and captions; auto looks."),
    ] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Shards written at the same time.")] = 1,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="ray uses the cluster at RAY_ADDRESS, or starts one here.")
    ] = "local",
    shard_size_mb: Annotated[
        int, typer.Option(min=1, help="Size at which a shard is full, MB of source files.")
    ] = 1000,
    shard_clips: Annotated[int, typer.Option(min=1, help="Source files at which a shard is full.")] = 10_000,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete what OUT holds of an earlier, different pack.")
    ] = False,
    verify: Annotated[
        Literal["none", "probe", "decode"],
        typer.Option(
            rich_help_panel=_CHECKS,
            help="none believes headers; probe reads all packets and one frame; decode decodes every frame.",
        ),
    ] = "probe",
    salvage: Annotated[
        bool, typer.Option("--salvage", rich_help_panel=_CHECKS, help="Keep the whole frames before a clip's damage.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(rich_help_panel=_CHECKS, help="Model folder or tokenizer.json: count caption tokens exactly."),
    ] = None,
    transcode: Annotated[
        Literal["480p", "720p"] | None,
        typer.Option(rich_help_panel=_CUTS, help="Encode as H.264, scaled down to just cover that size."),
    ] = None,
    deinterlace: Annotated[
        bool, typer.Option("--deinterlace", rich_help_panel=_CUTS, help="Encode interlaced clips without combs.")
    ] = False,
    tonemap: Annotated[
        bool, typer.Option("--tonemap", rich_help_panel=_CUTS, help="Encode HDR (PQ, HLG) clips in BT.709.")
    ] = False,
    scene_split: Annotated[
        bool, typer.Option("--scene-split", rich_help_panel=_CUTS, help="Cut where the scene changes (PySceneDetect).")
    ] = False,
    max_clip_seconds: Annotated[
        float | None, typer.Option(rich_help_panel=_CUTS, help="Cut longer clips into equal parts, s.")
    ] = None,
    min_seconds: Annotated[float | None, typer.Option(rich_help_panel=_FILTERS, help="Drop shorter clips, s.")] = None,
    max_seconds: Annotated[float | None, typer.Option(rich_help_panel=_FILTERS, help="Drop longer clips, s.")] = None,
    min_side: Annotated[
        int | None, typer.Option(rich_help_panel=_FILTERS, help="Drop clips whose shorter side is less, px.")
    ] = None,
    drop_static: Annotated[
        bool, typer.Option("--drop-static", rich_help_panel=_FILTERS, help="Drop clips in which nothing moves.")
    ] = False,
    drop_black: Annotated[
        bool, typer.Option("--drop-black", rich_help_panel=_FILTERS, help="Drop black clips.")
    ] = False,
    drop_duplicates: Annotated[
        bool,
        typer.Option("--drop-duplicates", rich_help_panel=_FILTERS, help="Drop clips whose bytes came before."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Pack clips and captions into WebDataset shards with an index and a manifest.

    A killed run goes on where it was when the same command is given again. Clips that cannot be used are listed with
    their reason in OUT/rejects.jsonl, and those worth a look in OUT/warnings.jsonl.

    Example: `wan-data pack clips/ shards/ --captions clips/captions.jsonl --workers 4`
    """
    rules = ClipRules(
        verify=verify,
        salvage=salvage,
        transcode=transcode,
        deinterlace=deinterlace,
        tonemap=tonemap,
        scene_split=scene_split,
        max_clip_s=max_clip_seconds,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        min_side_px=min_side,
        drop_static=drop_static,
        drop_black=drop_black,
    )
    started_s = time.monotonic()
    with show_progress() as progress:
        result = pack_clips(
            source,
            out,
            captions_path=captions,
            source_format=source_format,
            rules=rules,
            drop_duplicates=drop_duplicates,
            tokenizer_path=tokenizer,
            executor=executor,
            num_workers=workers,
            shard_bytes=shard_size_mb * 1_000_000,
            shard_clips=shard_clips,
            restart=restart,
            progress=progress,
        )
    seconds = time.monotonic() - started_s
    if as_json:
        typer.echo(json.dumps({"out": str(out), **asdict(result), "seconds": round(seconds, 3)}))
    else:
        typer.echo(_describe(out, result, seconds))


def _describe(out: Path, result: PackResult, seconds: float) -> str:
    shards = counted(result.num_shards, "shard")
    clips = counted(result.num_clips, "clip")
    lines = [f"{out}: {clips} in {shards}, {result.num_bytes / 1e6:.1f} MB, {seconds:.1f} s"]
    if result.resumed_shards:
        lines.append(f"kept from an earlier run: {result.resumed_shards} of {shards}")
    for title, name, codes in (
        ("rejected", REJECTS_NAME, result.rejects),
        ("packed, but worth a look", WARNINGS_NAME, result.warnings),
    ):
        if codes:
            lines.append(f"{title}: {', '.join(f'{count} {code}' for code, count in codes.items())}; see {out / name}")
            lines += _table(out / name)
    return "\n".join(lines)


def _table(path: Path) -> list[str]:
    """Return a row per code: how many, and the first of them."""
    first: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for line in path.read_text().split("\n"):
        if line:
            row = json.loads(line)
            first.setdefault(row["code"], row)
            counts[row["code"]] = counts.get(row["code"], 0) + 1
    width = max(map(len, counts))
    rows = sorted(counts, key=lambda code: (-counts[code], code))
    return [f"{counts[c]:>8}  {c:<{width}}  {first[c]['path']}: {first[c]['hint']}" for c in rows]
