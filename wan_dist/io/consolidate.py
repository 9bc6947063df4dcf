"""Sharded checkpoints into folders that users load."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_dist.core.errors import CheckpointError, ModelError
from wan_dist.io.checkpoint import Checkpoint, newest_whole, read_manifest, step_folders
from wan_dist.io.run_folder import checkpoints_dir
from wan_dist.io.safetensors_stream import write_sharded
from wan_dist.io.zero_shards import ShardedTensor, read_master_weights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_WEIGHTS_NAME = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Progress:
    """How a long export reports: `start(total_bytes)` once, then `advance(num_bytes)`."""

    start: Callable[[int], None]
    advance: Callable[[int], None]


def find_checkpoint(path: Path) -> Checkpoint:
    """Return the verified checkpoint that a run folder (its newest whole one) or a checkpoint folder names.

    Raises:
        CheckpointError: none there, or the named one is damaged.
    """
    if (path / "manifest.json").is_file():
        checkpoint = read_manifest(path)
        if problems := checkpoint.problems():
            raise CheckpointError(f"{'; '.join(problems)}; choose another checkpoint of {path.parent}.")
        return checkpoint
    root = checkpoints_dir(path)
    checkpoint = newest_whole(root)
    if checkpoint is None:
        seen = f"{len(step_folders(root))} damaged ones" if step_folders(root) else "none"
        raise CheckpointError(f"{path}: no whole checkpoint under {root} ({seen}); give a run or checkpoint folder.")
    return checkpoint


def to_diffusers(
    checkpoint: Checkpoint, out: Path, *, dtype: torch.dtype, max_shard_bytes: int, progress: Progress
) -> Path:
    """Write a diffusers pipeline folder: the trained transformer and the base pipeline's other parts.

    Args:
        checkpoint: a verified checkpoint.
        out: folder to make; it appears only when complete.
        dtype: dtype of the transformer's tensors.
        max_shard_bytes: size at which a new weight file begins.
        progress: told of bytes written and compared.

    Returns:
        `out`.

    Raises:
        CheckpointError: `out` exists, or the checkpoint's layout is unknown.
        ModelError: the base pipeline folder that the run names is gone.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not empty; give a new folder.")
    base, (trained,) = Path(checkpoint.state["model_path"]), checkpoint.components
    if not (base / trained / "config.json").is_file():
        raise ModelError(f"{base}: the base pipeline of this run is gone; put it back, its other parts are needed.")
    tensors = read_master_weights(checkpoint.folder / trained)
    out = out.resolve()  # "." has no name to derive another from
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copytree(base, temporary, ignore=_weights_of(base / trained))
        _write_transformer(temporary / trained, tensors, checkpoint, dtype, max_shard_bytes, progress)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def _weights_of(folder: Path) -> Callable[[str, list[str]], list[str]]:
    """Return a copytree filter that leaves out the old weights of one component."""

    def ignore(directory: str, names: list[str]) -> list[str]:
        if Path(directory) != folder:
            return []
        return [n for n in names if n.startswith(_WEIGHTS_NAME)]

    return ignore


def _write_transformer(
    folder: Path,
    tensors: dict[str, ShardedTensor],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    total = sum(torch.Size(t.shape).numel() for t in tensors.values()) * dtype.itemsize
    progress.start(2 * total)  # written once, read back once
    metadata = {
        "format": "pt",
        "wan_dist.step": str(checkpoint.step),
        "wan_dist.state": json.dumps(checkpoint.state, sort_keys=True),
    }
    write_sharded(
        folder,
        _WEIGHTS_NAME,
        tensors,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        metadata=metadata,
        on_bytes=progress.advance,
    )


FORMATS = {"diffusers": to_diffusers}
