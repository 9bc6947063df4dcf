"""`wan-data inspect`: what a folder of shards holds."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from wan_dist.data.index import ShardSet, open_shards


def inspect(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="Folder written by `wan-data pack`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show shards, clips, sizes, frame rates and durations.

    Example: `wan-data inspect shards/`
    """
    opened = open_shards(shards)
    kinds = _kinds(opened)
    if as_json:
        manifest = opened.manifest
        summary = {
            "shards": len(manifest.shards),
            "clips": manifest.num_clips,
            "bytes": manifest.num_bytes,
            "digest": manifest.digest,
            "rejects": manifest.rejects,
            "kinds": kinds,
        }
        typer.echo(json.dumps(summary))
        return
    typer.echo(_describe(opened, kinds))


def _kinds(opened: ShardSet) -> list[dict[str, Any]]:
    """Return one row per size and frame rate, the most frequent first."""
    fields = ["width", "height", "num_frames", "fps", "duration_s"]
    parts = [np.asarray(opened.index(shard)[fields]) for shard in range(len(opened.manifest.shards))]
    rows = np.concatenate(parts)
    groups = np.stack([rows["width"], rows["height"], np.round(rows["fps"], 2)], axis=1)
    kinds, kind_of = np.unique(groups, axis=0, return_inverse=True)
    found = [_kind(kind, rows[kind_of == number]) for number, kind in enumerate(kinds)]
    return sorted(found, key=lambda k: -k["clips"])


def _kind(kind: NDArray[np.float64], rows: NDArray[Any]) -> dict[str, Any]:
    return {
        "width": int(kind[0]),
        "height": int(kind[1]),
        "fps": float(kind[2]),
        "clips": len(rows),
        "num_frames": [int(rows["num_frames"].min()), int(rows["num_frames"].max())],
        "duration_s": [round(float(rows["duration_s"].min()), 3), round(float(rows["duration_s"].max()), 3)],
    }


def _describe(opened: ShardSet, kinds: list[dict[str, Any]]) -> str:
    manifest = opened.manifest
    rejects = ", ".join(f"{count} {code}" for code, count in manifest.rejects.items()) or "none"
    lines = [
        f"{opened.folder}: clips {manifest.num_clips}, shards {len(manifest.shards)}, {_megabytes(manifest.num_bytes)}",
        f"rejected: {rejects}",
        f"{'size px':>11} {'fps':>7} {'clips':>7} {'frames':>11} {'seconds':>15}",
    ]
    for kind in kinds:
        low, high = kind["num_frames"]
        short, long = kind["duration_s"]
        lines.append(
            f"{kind['width']:>6}x{kind['height']:<4} {kind['fps']:>7g} {kind['clips']:>7} "
            f"{_span(low, high, 'd'):>11} {_span(short, long, '.2f'):>15}"
        )
    return "\n".join(lines)


def _span(low: float, high: float, spec: str) -> str:
    return f"{low:{spec}}" if low == high else f"{low:{spec}}-{high:{spec}}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
