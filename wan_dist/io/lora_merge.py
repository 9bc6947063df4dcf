"""LoRAs into base weights and out again, streamed: memory stays at some chunks, whatever the size of the model."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wan_dist.adapters.lora_files import LoraWeights, check_expert, read_lora
from wan_dist.core.errors import CheckpointError, ModelError
from wan_dist.core.hashing import sha256_of
from wan_dist.io.component_weights import merged_weights
from wan_dist.io.consolidate import Progress, check_folder, copied_bytes, copy_pipeline, new_folder
from wan_dist.io.lora_export import check_free
from wan_dist.io.model_files import WEIGHTS_NAME, ModelFiles, in_naming, open_model
from wan_dist.io.safetensors_stream import HASH_KEY, num_bytes, write_file, write_sharded
from wan_dist.io.tensor_stream import TensorStream
from wan_dist.models.wan.transformer import EXPERT_FOLDERS

_EXPERTS = {folder: expert for expert, folder in EXPERT_FOLDERS.items()}


@dataclass(frozen=True)
class Applied:
    """One LoRA to add.

    Attributes:
        path: its file.
        multiplier: strength; 1 is as trained, negative takes it out again.
    """

    path: Path
    multiplier: float


def merge_loras(
    base: Path,
    out: Path,
    loras: Mapping[str, Sequence[Applied]],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Progress,
    dry_run: bool = False,
) -> Path:
    """Write a model with LoRAs in its weights, in the layout of the base.

    Args:
        base: a pipeline folder, a transformer's folder, or a single file in any naming.
        out: folder to make; a file for a single file.
        loras: by component; `transformer` is the high-noise or only one. Applied in their order, in fp32.
        dtype: of the result; None keeps each tensor's.
        max_shard_bytes: size at which a new weight file begins.
        progress: told of bytes written and compared.
        dry_run: check all that can be checked without writing, tell `progress` the size, and stop.

    Returns:
        `out`.

    Raises:
        ModelError: base or LoRA cannot be read, do not fit, or a LoRA is for the other expert.
        CheckpointError: `out` exists.
    """
    pipeline = (base / "model_index.json").is_file()
    wanted = {component: applied for component, applied in loras.items() if applied}
    if not wanted:
        raise ModelError("no LoRA was given; name one by --lora.")
    if not pipeline and set(wanted) != {"transformer"}:
        raise ModelError(f"{base}: is one transformer, so only --lora goes with it; merge each expert by itself.")
    models, merged = {}, {}
    for component, applied in wanted.items():
        place = base / component if pipeline else base
        models[component] = open_model(place)
        expert = _EXPERTS[component] if pipeline else _expert_of(base, models[component])
        read = [(_read(one, expert), one.multiplier) for one in applied]
        merged[component] = merged_weights(models[component].tensors, read, str(place))
    size = sum(num_bytes(tensors, dtype) for tensors in merged.values())
    progress.start(2 * size)
    writer = _Writer(dtype, max_shard_bytes, progress)
    size += copied_bytes(base, merged) if pipeline else 0
    if base.is_file():
        check_free(out)
    if dry_run:
        if base.is_dir():
            check_folder(out, size)
        return out
    if base.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.file(out, models["transformer"], merged["transformer"], wanted["transformer"])
        return out
    with new_folder(out, size) as folder:
        if pipeline:
            copy_pipeline(base, folder, merged)
        else:
            _copy_small_files(base, folder)
        for component, tensors in merged.items():
            target = folder / component if pipeline else folder
            writer.folder(target, models[component], tensors, wanted[component])
    return out


def _expert_of(base: Path, model: ModelFiles) -> str | None:
    """Return which expert a folder or file says that it is, None if it does not say."""
    if stated := model.metadata.get("wan_dist.expert"):
        return stated
    if (base.resolve().parent / "transformer_2").is_dir():
        return _EXPERTS.get(base.resolve().name)
    return next((expert for expert in EXPERT_FOLDERS if base.resolve().name == f"{expert}_model"), None)


def _read(applied: Applied, expert: str | None) -> LoraWeights:
    weights = read_lora(applied.path)
    if applied.multiplier < 0 and weights.uses_dora:
        raise ModelError(f"{applied.path}: a DoRA cannot be taken out again: merging lost the length of each row.")
    check_expert(applied.path, weights.expert, expert)
    return weights


def _copy_small_files(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copy2(path, folder / path.name)


@dataclass(frozen=True)
class _Writer:
    dtype: torch.dtype | None
    max_shard_bytes: int
    progress: Progress

    def file(
        self, out: Path, model: ModelFiles, tensors: Mapping[str, TensorStream], applied: Sequence[Applied]
    ) -> None:
        write_file(
            out,
            in_naming(tensors, model.naming),
            dtype=self.dtype,
            metadata=_header(model, applied),
            on_bytes=self.progress.advance,
        )

    def folder(
        self, folder: Path, model: ModelFiles, tensors: Mapping[str, TensorStream], applied: Sequence[Applied]
    ) -> None:
        write_sharded(
            folder,
            WEIGHTS_NAME,
            in_naming(tensors, model.naming),
            dtype=self.dtype,
            max_shard_bytes=self.max_shard_bytes,
            metadata=_header(model, applied),
            on_bytes=self.progress.advance,
        )


def _header(model: ModelFiles, applied: Sequence[Applied]) -> dict[str, str]:
    """Return the base's header strings and what was merged into it, also earlier."""
    try:
        earlier = json.loads(model.metadata.get("wan_dist.merged", "[]"))
    except ValueError:
        raise CheckpointError("the base's header string wan_dist.merged is no JSON; it was damaged.") from None
    now = [{"lora": a.path.name, "sha256": _digest(a.path), "multiplier": a.multiplier} for a in applied]
    return {"format": "pt", **model.metadata, "wan_dist.merged": json.dumps([*earlier, *now]), HASH_KEY: ""}


def _digest(path: Path) -> str:
    return sha256_of(path / "adapter_model.safetensors" if path.is_dir() else path)
