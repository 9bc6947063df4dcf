"""The weights that a checkpoint holds, per component, as streams under diffusers' names."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from wan_dist.adapters.lora_files import LoraModule, LoraWeights
from wan_dist.core.errors import CheckpointError, ModelError
from wan_dist.io.checkpoint import Checkpoint, average_name, newest_whole, read_manifest, step_folders
from wan_dist.io.model_files import open_model
from wan_dist.io.run_folder import checkpoints_dir
from wan_dist.io.tensor_stream import TensorStream, of_shards, with_loras
from wan_dist.io.zero_shards import ShardedTensor, Shards, master_weights, open_shards
from wan_dist.models.wan.transformer import EXPERT_FOLDERS
from wan_dist.models.wan.variants import get_variant

_EXPERTS = {folder: expert for expert, folder in EXPERT_FOLDERS.items()}
_LORA_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.weight")


def find_checkpoint(path: Path, *, trusted: bool = False) -> Checkpoint:
    """Return the verified checkpoint that a run folder (its newest whole one) or a checkpoint folder names.

    Args:
        path: run folder or checkpoint folder.
        trusted: the user vouches for a checkpoint that no run of this user wrote.

    Raises:
        CheckpointError: none there, the named one is damaged, or it is somebody else's.
    """
    checkpoint = _verified(path)
    checkpoint.require_own(trusted=trusted, option="--trust-checkpoint")
    return checkpoint


def _verified(path: Path) -> Checkpoint:
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


def method_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return what was trained: `kind` full, lora or embedding, and its settings."""
    return checkpoint.state.get("method", {"kind": "full"})


def expert_of(checkpoint: Checkpoint, component: str) -> str | None:
    """Return the expert that a component is, None for the only transformer of its variant."""
    two = get_variant(checkpoint.state["variant"]).num_transformers == 2
    return _EXPERTS.get(component) if two else None


def chosen_components(checkpoint: Checkpoint, expert: str | None) -> tuple[str, ...]:
    """Return the trained transformers, or the one that `expert` names.

    Raises:
        CheckpointError: that expert was not trained.
    """
    if expert is None:
        return checkpoint.components
    found = tuple(name for name in checkpoint.components if expert_of(checkpoint, name) == expert)
    if not found:
        trained = [expert_of(checkpoint, name) or name for name in checkpoint.components]
        raise CheckpointError(f"{checkpoint.folder}: --expert {expert} was not trained; it has {', '.join(trained)}.")
    return found


def trained_tensors(checkpoint: Checkpoint, component: str, *, ema: bool = False) -> dict[str, ShardedTensor]:
    """Return what was trained of a component, fp32, nothing loaded yet.

    Args:
        checkpoint: a verified checkpoint of a run that is trusted.
        component: one of its components.
        ema: the running average instead of the weights.

    Raises:
        CheckpointError: unknown layout, or no average was kept.
    """
    shards = open_shards(checkpoint.folder / component)
    return master_weights(_averaged(shards) if ema else shards, frozen=False)


def full_weights(checkpoint: Checkpoint, component: str, *, ema: bool = False) -> dict[str, TensorStream]:
    """Return all weights of a fully trained transformer."""
    return {name: of_shards(t) for name, t in trained_tensors(checkpoint, component, ema=ema).items()}


def lora_weights(checkpoint: Checkpoint, component: str, *, ema: bool = False) -> LoraWeights:
    """Return the LoRA that a component was trained as, fp32, in memory.

    Raises:
        CheckpointError: the component was not trained as a LoRA.
    """
    method = method_of(checkpoint)
    if method["kind"] != "lora":
        raise CheckpointError(
            f"{checkpoint.folder}: holds {method['kind']} training, no LoRA; use wan-dist consolidate."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in trained_tensors(checkpoint, component, ema=ema).items():
        match = _LORA_PART.fullmatch(name)
        if not match:
            raise CheckpointError(f"{checkpoint.folder / component}: {name} is no part of a LoRA.")
        parts.setdefault(match[1], {})[match[2]] = torch.cat(tensor.pieces).reshape(tensor.shape)
    scale = method["alpha"] / (method["rank"] ** 0.5 if method.get("use_rslora") else method["rank"])
    modules = {
        stem: LoraModule(found["lora_A"], found["lora_B"], scale, found.get("lora_magnitude_vector"))
        for stem, found in parts.items()
    }
    expert = expert_of(checkpoint, component)
    return LoraWeights(modules, "checkpoint", metadata={"wan_dist.expert": expert} if expert else {})


def merged_weights(
    base: Mapping[str, TensorStream], loras: Sequence[tuple[LoraWeights, float]], where: str
) -> dict[str, TensorStream]:
    """Return base weights with LoRAs applied on the way.

    Args:
        base: a transformer's weights by diffusers' names.
        loras: each with its multiplier, applied in their order.
        where: what to call the base in messages.

    Raises:
        ModelError: a LoRA targets a weight that the base has not, or of another shape.
    """
    merged = dict(base)
    for weights, multiplier in loras:
        for stem, module in weights.modules.items():
            name = f"{stem}.weight"
            if name not in base:
                raise ModelError(f"{where}: has no {name}, which the LoRA changes; it is of another variant.")
            wanted = (module.b.shape[0], *module.a.shape[1:])
            if tuple(base[name].shape) != wanted:
                raise ModelError(
                    f"{where}: {name} is {list(base[name].shape)}, the LoRA changes a weight of {list(wanted)}; "
                    "it is of another variant."
                )
            merged[name] = with_loras(merged[name], [(module, multiplier)])
    return merged


def base_transformer(checkpoint: Checkpoint, component: str) -> dict[str, TensorStream]:
    """Return the weights that a run started from.

    Raises:
        ModelError: they are gone.
    """
    return open_model(Path(checkpoint.state["model_path"]) / component).tensors


def _averaged(shards: Shards) -> Shards:
    """Return shards whose flat groups are the running average, one safetensors file per rank in the same layout."""
    flats = []
    for rank, groups in enumerate(shards.flats):
        path = shards.folder / average_name(rank)
        if not path.is_file():
            raise CheckpointError(f"{path}: absent; this run kept no average (train.ema_decay), leave --ema out.")
        try:
            handle = safe_open(path, framework="pt").__enter__()  # stays open: its mapping is read later
            flats.append([handle.get_tensor(f"group_{number:04d}") for number in range(len(groups))])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}).") from None
        for number, (average, group) in enumerate(zip(flats[-1], groups, strict=True)):
            # Below ZeRO-3 DeepSpeed saves the weights without the padding at the end, which the average has.
            if average.numel() < group.numel():
                raise CheckpointError(f"{path}: group {number} has {average.numel()} elements, not {group.numel()}.")
    return dataclasses.replace(shards, flats=tuple(flats))
