"""What a run trains upon and does not save: the base model's weights, known by their digest."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_dist.core.errors import ModelError
from wan_dist.core.hashing import sha256_of
from wan_dist.io.hashing import write_json_atomic

_CACHE_NAME = "base_sha256.json"


def base_digests(model: Path, components: Sequence[str], run_dir: Path) -> dict[str, str]:
    """Return a SHA-256 over the weight files of each component of a pipeline folder.

    A file is read once per run: its hash is kept in the run folder with its size and time of change. 28 GB take half
    a minute.

    Args:
        model: diffusers folder of the pipeline.
        components: folders inside.
        run_dir: run folder, which is there.
    Raises:
        ModelError: a component has no weight files.
    """
    cache_path = run_dir / _CACHE_NAME
    cache = _read(cache_path)
    digests, used = {}, {}
    for component in components:
        files = sorted((model / component).glob("*.safetensors"))
        if not files:
            raise ModelError(f"{model / component}: holds no *.safetensors.")
        combined = hashlib.sha256()
        for file in files:
            stat = file.stat()
            key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
            used[key] = cache.get(key) or sha256_of(file)
            combined.update(f"{file.name} {used[key]}\n".encode())
        digests[component] = combined.hexdigest()
    if used != cache:
        write_json_atomic(cache_path, used)
    return digests


def _read(path: Path) -> dict[str, Any]:
    try:
        cache = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}
