"""`wan-data inspect`: what a folder of shards holds."""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from data_tools.inspect_family import describe_family, families_of, family_report, family_sample, is_family
from data_tools.inspect_tar import describe_member, describe_tar, sample_report, tar_report
from data_tools.plan_report import describe_plan, plan_report
from wan_dist.core.errors import DataError
from wan_dist.data.index import MEMBERS, ShardSet, open_shards
from wan_dist.data.reader import locate, read_member
from wan_dist.data.stores import LocalStore


def inspect(
    shards: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Folder or URL of packed shards, cached family, or any tar.")
    ],
    key: Annotated[str | None, typer.Option(help="Show the members of this sample.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Training config: show what it makes of the shards.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show shards, clips, sizes, frame rates and durations; or cached latents or text; or one tar; or one sample.

    With --plan: buckets, clips left out with the reason, steps per epoch, and the numbers of ranks that divide the
    batch.

    Example: `wan-data inspect shards/`
    """
    if plan is not None:
        report = plan_report(plan, [f"data.shards={shards}"])
        typer.echo(json.dumps(report) if as_json else describe_plan(report))
        return
    if shards.endswith(".tar") and Path(shards).is_file():
        if key is None:
            report = tar_report(Path(shards))
            typer.echo(json.dumps(report) if as_json else describe_tar(report))
        else:
            typer.echo(json.dumps(sample_report(Path(shards), key), indent=None if as_json else 1))
        return
    if is_family(Path(shards)):
        family = family_report(Path(shards)) if key is None else family_sample(Path(shards), key)
        typer.echo(describe_family(family) if key is None and not as_json else json.dumps(family))
        return
    opened = open_shards(shards)
    if key is not None:
        typer.echo(json.dumps(_sample(opened, key), indent=None if as_json else 1))
        return
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


def _sample(opened: ShardSet, key: str) -> dict[str, Any]:
    """Return what the members of one sample hold."""
    for shard in range(len(opened.manifest.shards)):
        rows = opened.index(shard)
        for number in np.flatnonzero(rows["key"] == key.encode()):
            row, tar = rows[number], opened.tar(shard)
            names = {"json": "json", "text": "txt", "media": row["media_ext"].decode(), "mask": "mask"}
            found = {"shard": str(tar)}
            for member in MEMBERS:
                if row[f"{member}_size"]:
                    found[names[member]] = describe_member(names[member], read_member(locate(tar, row, member)), key)
            return found
    raise DataError(f"{opened.name}: no sample {key}; keys are in the tars and in the indexes.")


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
        f"{opened.name}: clips {manifest.num_clips}, shards {len(manifest.shards)}, {_megabytes(manifest.num_bytes)}",
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
    if isinstance(opened.store, LocalStore):
        lines += families_of(opened.store.folder)
    return "\n".join(lines)


def _span(low: float, high: float, spec: str) -> str:
    return f"{low:{spec}}" if low == high else f"{low:{spec}}-{high:{spec}}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
