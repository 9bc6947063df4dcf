"""Official and ComfyUI weights into a diffusers pipeline folder, streamed."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wan_dist.adapters.lora_files import EXPERT_KEY, check_expert
from wan_dist.core.errors import ModelError
from wan_dist.io.consolidate import Progress, check_folder, copy_tree, new_folder
from wan_dist.io.hashing import write_json_atomic
from wan_dist.io.model_files import WEIGHTS_NAME, ModelFiles, open_model, weight_files
from wan_dist.io.safetensors_stream import num_bytes, write_sharded
from wan_dist.models.wan.original import diffusers_config
from wan_dist.models.wan.transformer import EXPERT_FOLDERS, empty_transformer, read_transformer_config
from wan_dist.models.wan.variants import WanVariant, get_variant

_EXPERT_OF = {component: expert for expert, component in EXPERT_FOLDERS.items()}


def find_experts(source: Path, variant: str, expert: str | None, low: Path | None) -> dict[str, Path]:
    """Return which weights become which component of the pipeline.

    Args:
        source: official folder, a folder of one transformer, or a single file.
        variant: official name.
        expert: which one `source` is, where it holds one of two.
        low: the low-noise expert's file or folder, where `source` is the high-noise one.

    Raises:
        ModelError: it cannot be told which expert is meant.
    """
    if not source.exists():
        raise ModelError(f"{source}: absent.")
    if (source / "model_index.json").is_file():
        raise ModelError(f"{source}: is a pipeline in diffusers layout already; train on it as it is.")
    if get_variant(variant).num_transformers == 1:
        if expert or low:
            raise ModelError(f"{variant} has one transformer; leave --expert and --low out.")
        return {"transformer": source}
    folders = {component: source / f"{name}_model" for name, component in EXPERT_FOLDERS.items()}
    if low is None and expert is None and all(folder.is_dir() for folder in folders.values()):
        return folders
    if low is not None:
        if expert == "low_noise":
            raise ModelError("--low names the low-noise expert already; the first argument is then the high-noise one.")
        return {"transformer": source, "transformer_2": low}
    if expert is None:
        raise ModelError(
            f"{source}: {variant} has two experts; give the official folder that holds high_noise_model and "
            "low_noise_model, the low-noise file by --low, or say by --expert which one this is."
        )
    return {EXPERT_FOLDERS[expert]: source}


def import_model(
    experts: Mapping[str, Path],
    out: Path,
    *,
    variant: str,
    base: Path | None,
    link: bool,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Progress,
    dry_run: bool = False,
) -> Path:
    """Write transformers in diffusers layout, with the other parts of a pipeline beside them.

    Args:
        experts: component to its weights in any naming (`find_experts`).
        out: folder to make; it appears only when complete.
        variant: official name.
        base: pipeline folder that gives VAE, text encoder, tokenizer, scheduler and the transformers that are not
            imported; None writes the transformers alone.
        link: make symbolic links to the base's parts instead of copies.
        dtype: of the result; None keeps each tensor's.
        max_shard_bytes: size at which a new weight file begins.
        progress: told of bytes written and compared.
        dry_run: check all that can be checked without writing, tell `progress` the size, and stop.

    Returns:
        `out`.

    Raises:
        ModelError: weights or base are unreadable, quantised, incomplete, of another variant or of the other expert.
        CheckpointError: `out` exists and is not empty.
    """
    spec = get_variant(variant)
    opened = {component: open_model(source) for component, source in experts.items()}
    for component, model in opened.items() if spec.num_transformers > 1 else ():
        check_expert(experts[component], model.metadata.get(EXPERT_KEY), _EXPERT_OF[component])
    configs = {
        component: _config(model, experts[component], spec, base / component if base else None)
        for component, model in opened.items()
    }
    size = sum(num_bytes(model.tensors, dtype) for model in opened.values())
    progress.start(2 * size)
    if dry_run:
        check_folder(out, size)
        return out
    with new_folder(out, size) as folder:
        if base:
            _take_parts(base, folder, set(experts), link)
        for component, model in opened.items():
            target = folder / component
            target.mkdir()
            write_json_atomic(target / "config.json", configs[component])
            names = [file.name for file in weight_files(experts[component])]
            write_sharded(
                target,
                WEIGHTS_NAME,
                model.tensors,
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
                metadata={"format": "pt", "wan_dist.imported_from": json.dumps(names)},
                on_bytes=progress.advance,
            )
    return out


def _config(model: ModelFiles, source: Path, spec: WanVariant, base: Path | None) -> dict[str, Any]:
    """Return the config.json of a transformer, checked against every tensor's shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.tensors.items()}
    if base and (base / "config.json").is_file():
        config = read_transformer_config(base, spec)
    else:
        config = diffusers_config(shapes, spec.name, _official_config(source))
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in empty_transformer(config).state_dict().items()}
    problems = [f"lacks {name}" for name in sorted(wanted.keys() - shapes.keys())]
    problems += [f"has {name}, which its config does not" for name in sorted(shapes.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(shapes[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{source}: does not fit {spec.name}: {', '.join(problems[:3])}{more}.")
    return config


def _official_config(source: Path) -> dict[str, Any] | None:
    path = (source if source.is_dir() else source.parent) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}).") from None
    return config if isinstance(config, dict) and "num_heads" in config else None


def _take_parts(base: Path, folder: Path, imported: set[str], link: bool) -> None:
    if not (base / "model_index.json").is_file():
        raise ModelError(f"{base}: no model_index.json; --base must be a pipeline folder in diffusers layout.")
    for path in sorted(base.iterdir()):
        if path.name in imported:
            continue
        if path.is_file():
            shutil.copy2(path, folder / path.name)
        elif link:
            (folder / path.name).symlink_to(path.resolve(), target_is_directory=True)
        else:
            copy_tree(path, folder / path.name)
