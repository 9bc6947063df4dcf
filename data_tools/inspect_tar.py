"""What any tar, or one sample of it, holds."""

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from wan_dist.core.errors import DataError
from wan_dist.data.probe import Reject
from wan_dist.data.reindex import probe_bytes
from wan_dist.data.source_files import CLIP_EXTENSIONS
from wan_dist.data.tar_walk import TarMember, walk_tar

_KEYS_SHOWN = 10


def tar_report(path: Path) -> dict[str, Any]:
    """Return samples, and members by extension, of a tar, as JSON values."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    keys: list[str] = []
    num_samples = 0
    for sample in walk_tar(path):
        num_samples += 1
        keys += [sample.key] if len(keys) < _KEYS_SHOWN else []
        for extension, member in sample.members.items():
            counts[extension] += 1
            sizes[extension] += member.size
    members = {e: {"count": counts[e], "bytes": sizes[e]} for e in counts}
    return {"tar": str(path), "samples": num_samples, "members": members, "first_keys": keys}


def sample_report(path: Path, key: str) -> dict[str, Any]:
    """Return what each member of one sample of a tar holds, as JSON values.

    Raises:
        DataError: the tar has no such sample.
    """
    for sample in walk_tar(path):
        if sample.key == key:
            with path.open("rb") as stream:

                def read(member: TarMember, stream: Any = stream) -> bytes:
                    stream.seek(member.offset)
                    return stream.read(member.size)

                return {extension: describe_member(extension, read(m), key) for extension, m in sample.members.items()}
    raise DataError(f"{path}: no sample {key}; `wan-data inspect {path}` lists some.")


def describe_member(extension: str, content: bytes, name: str) -> Any:
    """Return what a member holds: text as it is, numbers of a clip, names and shapes of tensors."""
    kind = extension.rpartition(".")[2]
    if kind == "txt":
        return content.decode("utf-8", "replace")
    if kind == "json":
        return json.loads(content)
    if kind == "safetensors":
        (length,) = struct.unpack_from("<Q", content)
        return json.loads(content[8 : 8 + length])
    if kind in CLIP_EXTENSIONS:
        found = probe_bytes(content, kind, name)
        return {
            "bytes": len(content),
            **({"reject": found.code, "hint": found.hint} if isinstance(found, Reject) else found.__dict__),
        }
    return {"bytes": len(content)}


def describe_tar(report: dict[str, Any]) -> str:
    """Return a tar's report as text."""
    members = [f"  .{e}: {m['count']} members, {m['bytes'] / 1e6:.1f} MB" for e, m in report["members"].items()]
    return "\n".join(
        [f"{report['tar']}: {report['samples']} samples", *members, f"  keys: {', '.join(report['first_keys'])}"]
    )
