"""What a folder of cached latents or text embeddings holds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import numpy as np

from wan_dist.core.errors import DataError
from wan_dist.core.words import counted
from wan_dist.data.family import FAMILY_NAME, Family, find_families, open_family, read_fingerprint, read_manifest
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.index import MANIFEST_NAME

_SIZES_SHOWN: Final = 8
_VALUE_LENGTH: Final = 80


def is_family(folder: Path) -> bool:
    """Whether a folder is one of cached latents or text."""
    return (folder / FAMILY_NAME).is_file()


def family_report(folder: Path) -> dict[str, Any]:
    """Return what a family holds, or how far it is, as JSON values.

    Raises:
        DataError: it is damaged.
    """
    fingerprint = read_fingerprint(folder)
    report: dict[str, Any] = {"folder": str(folder), "kind": fingerprint.get("kind"), "fingerprint": fingerprint}
    if not (folder / MANIFEST_NAME).exists():
        finished = len(list((folder / "journal").glob("*.json")))
        return report | {"finished": False, "finished_shards": finished}
    family = open_family(folder, read_manifest(folder).kind)
    manifest = family.manifest
    report |= {"finished": True, "shards": len(manifest.shards), "clips": manifest.num_clips}
    return report | {"bytes": manifest.num_bytes, "rejects": manifest.rejects, "tensors": _tensors(family)}


def family_sample(folder: Path, key: str) -> dict[str, Any]:
    """Return names and shapes of one clip's tensors, as JSON values.

    Raises:
        DataError: there is no such clip, or its tensors are damaged.
    """
    family = open_family(folder, read_manifest(folder).kind)
    for shard in range(len(family.manifest.shards)):
        for row in np.flatnonzero(family.index(shard)["key"] == key.encode()):
            return {"shard": str(family.tar_path(shard)), "dtype": "bf16", "shapes": _shapes(family, shard, int(row))}
    raise DataError(f"{folder}: no sample {key}; its keys are those of the clips.")


def describe_family(report: dict[str, Any]) -> str:
    """Return a family's report as text."""
    head = f"{report['folder']}: {report['kind']}"
    if not report["finished"]:
        done = counted(report["finished_shards"], "shard")
        return f"{head}, unfinished: {done} written; run `wan-data cache` again"
    lines = [f"{head}: clips {report['clips']}, shards {report['shards']}, {report['bytes'] / 1e6:.1f} MB"]
    if report["rejects"]:
        lines.append(f"left out: {', '.join(f'{count} {why}' for why, count in report['rejects'].items())}")
    for row in report["tensors"]:
        shapes = ", ".join(f"{name} {shape}" for name, shape in row["shapes"].items())
        lines.append(f"{row['clips']:>8} x {shapes}, bf16")
    return "\n".join([*lines, "made from:", *_flat(report["fingerprint"])])


def families_of(shards_dir: Path) -> list[str]:
    """Return a line for every family beside some shards."""
    lines = []
    for folder in [*find_families(shards_dir, "latents"), *find_families(shards_dir, "text")]:
        state = "cached" if (folder / MANIFEST_NAME).exists() else "unfinished cache"
        lines.append(f"{state}: {folder}")
    return lines


def _tensors(family: Family) -> list[dict[str, Any]]:
    """Return the shapes of one clip of every size in bytes, the most frequent first."""
    sizes: Counter[int] = Counter()
    first: dict[int, tuple[int, int]] = {}
    for shard in range(len(family.manifest.shards)):
        found = np.unique(family.index(shard)["size"], return_index=True, return_counts=True)
        for size, row, count in zip(*(column.tolist() for column in found), strict=True):
            sizes[size] += count
            first.setdefault(size, (shard, row))
    del sizes[0]  # clips that are in no bucket
    return [
        {"clips": count, "bytes": size, "shapes": _shapes(family, *first[size])}
        for size, count in sizes.most_common(_SIZES_SHOWN)
    ]


def _shapes(family: Family, shard: int, row: int) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in FamilyReader(family).read(shard, row).items()}


def _flat(values: dict[str, Any], prefix: str = "  ") -> list[str]:
    """Return a line per value of nested mappings."""
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value)
            lines.append(f"{prefix}{name}: {text if len(text) <= _VALUE_LENGTH else text[:_VALUE_LENGTH] + '...'}")
    return lines
