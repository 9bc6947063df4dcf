"""LoRA files out: from checkpoints, from other files, and from the difference of two models."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wan_dist.adapters.lora_files import LoraModule, LoraWeights, read_lora
from wan_dist.adapters.lora_formats import lora_header, lora_tensors
from wan_dist.adapters.lora_math import low_rank_part, magnitude_over
from wan_dist.core.errors import CheckpointError, ModelError
from wan_dist.io.checkpoint import Checkpoint
from wan_dist.io.component_weights import base_transformer, chosen_components, expert_of, lora_weights, method_of
from wan_dist.io.model_files import open_model
from wan_dist.io.provenance import header_of
from wan_dist.io.safetensors_stream import HASH_KEY, write_file
from wan_dist.io.tensor_stream import TensorStream, of_tensor
from wan_dist.models.wan.keys import takes_lora

_OVER_BASE = {"comfyui": True, "kohya": True, "diffusers": False}


@dataclass(frozen=True)
class Extracted:
    """The low-rank part of the difference of two models.

    Attributes:
        weights: the LoRA.
        left: module to |difference - B @ A| / |difference|.
        not_carried: changed tensors that no LoRA can hold: norms, biases, modulation.
    """

    weights: LoraWeights
    left: dict[str, float]
    not_carried: list[str]


def export_loras(
    checkpoint: Checkpoint,
    out: Path,
    *,
    layout: str,
    dtype: torch.dtype,
    expert: str | None = None,
    ema: bool = False,
) -> list[Path]:
    """Write the LoRA of each trained expert, as NAME_high_noise and NAME_low_noise where the variant has two.

    Args:
        checkpoint: a verified checkpoint of LoRA training.
        out: `NAME.safetensors`.
        layout: a key of `LAYOUTS`.
        dtype: of the matrices.
        expert: only this one.
        ema: the running average instead of the last weights.

    Returns:
        The files.

    Raises:
        CheckpointError: no LoRA in it, or a file exists.
        ModelError: the layout cannot carry it.
    """
    if (kind := method_of(checkpoint)["kind"]) != "lora":
        verb = "embedding export" if kind == "embedding" else "consolidate"
        raise CheckpointError(f"{checkpoint.folder}: holds {kind} training, no LoRA; use wan-dist {verb}.")
    targets = {name: _file_of(out, expert_of(checkpoint, name)) for name in chosen_components(checkpoint, expert)}
    check_free(*targets.values())
    for component, path in targets.items():
        weights = lora_weights(checkpoint, component, ema=ema)
        base = base_transformer(checkpoint, component) if weights.uses_dora else None
        header = header_of(checkpoint, component, path.stem, ema=ema, kind="lora")
        save_lora(path, weights, layout=layout, dtype=dtype, base=base, header=header)
    return list(targets.values())


def convert_lora(
    source: Path, out: Path, *, layout: str, dtype: torch.dtype | None, base: Path | None, component: str | None
) -> None:
    """Write any LoRA file in another format.

    Args:
        source: a file or folder that `read_lora` reads.
        out: file to make.
        layout: a key of `LAYOUTS`.
        dtype: of the matrices; None keeps that of the source.
        base: the model that a DoRA was trained on.
        component: transformer or transformer_2, for a file that holds both.

    Raises:
        ModelError: the source cannot be read, or the layout cannot carry it.
        CheckpointError: `out` exists.
    """
    check_free(out)
    weights = read_lora(source, component)
    tensors = open_model(base).tensors if base else None
    kept = next(iter(weights.modules.values())).a.dtype
    header = {k: v for k, v in weights.metadata.items() if k.startswith(("modelspec.", "wan_dist."))}
    save_lora(
        out, weights, layout=layout, dtype=dtype or kept, base=tensors, header={"format": "pt", **header, HASH_KEY: ""}
    )


def save_lora(
    path: Path,
    weights: LoraWeights,
    *,
    layout: str,
    dtype: torch.dtype,
    base: Mapping[str, TensorStream] | None,
    header: Mapping[str, str],
) -> None:
    """Write one LoRA file, read back and compared.

    Args:
        path: file to make.
        weights: the LoRA.
        layout: a key of `LAYOUTS`.
        dtype: of the matrices.
        base: weights by diffusers' names, for a DoRA whose magnitudes the layout's readers take otherwise.
        header: further header strings.
    """
    weights = _with_magnitudes_for(weights, layout, base)
    tensors = {name: of_tensor(tensor) for name, tensor in lora_tensors(weights, layout, dtype).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, tensors, dtype=None, metadata={**header, **lora_header(weights, layout)}, on_bytes=lambda _: None)


def extract_lora(base: Path, tuned: Path, *, rank: int, on_module: Callable[[str], None] = lambda _: None) -> Extracted:
    """Return the low-rank part of what tuning changed, one weight in memory at a time.

    Args:
        base: a transformer's folder or file.
        tuned: the same, tuned.
        rank: of the result; a smaller matrix gets its own size.
        on_module: told each module before it is decomposed.

    Raises:
        ModelError: the two are not of one shape, or equal.
    """
    before, after = open_model(base).tensors, open_model(tuned).tensors
    if {n: t.shape for n, t in before.items()} != {n: t.shape for n, t in after.items()}:
        raise ModelError(f"{tuned}: its tensors are not those of {base}; both must be of one variant.")
    modules: dict[str, LoraModule] = {}
    left: dict[str, float] = {}
    not_carried = []
    for name, tensor in before.items():
        stem, _, kind = name.rpartition(".")
        difference = _whole(after[name]) - _whole(tensor)
        if not bool(difference.any()):
            continue
        if kind != "weight" or not takes_lora(stem):
            not_carried.append(name)
            continue
        on_module(stem)
        a, b, left[stem] = low_rank_part(difference.flatten(1), min(rank, *difference.flatten(1).shape))
        ones = [1] * (difference.dim() - 2)
        modules[stem] = LoraModule(a.reshape(-1, *difference.shape[1:]), b.reshape(*b.shape, *ones), 1.0)
    if not modules:
        raise ModelError(f"{tuned}: no weight that a LoRA can change differs from {base}.")
    return Extracted(LoraWeights(modules, "extracted"), left, not_carried)


def describe_lora(path: Path, component: str | None = None) -> dict[str, Any]:
    """Return what a LoRA file holds, as JSON values: format, ranks, alphas, targets, norms, header.

    Norms are Frobenius norms of scale * B @ A.
    """
    weights = read_lora(path, component)
    modules = weights.modules
    return {
        "file": str(path),
        "format": weights.layout,
        "expert": weights.expert,
        "num_modules": len(modules),
        "num_parameters": sum(m.a.numel() + m.b.numel() for m in modules.values()),
        "dtype": str(next(iter(modules.values())).a.dtype).removeprefix("torch."),
        "ranks": sorted({m.rank for m in modules.values()}),
        "alphas": sorted({round(m.alpha, 6) for m in modules.values()}),
        "scale_stated": weights.scale_stated,
        "dora": weights.uses_dora,
        "targets": sorted({_without_number(name) for name in modules}),
        "norms": {name: _change_norm(module) for name, module in modules.items()},
        "metadata": {name: _decoded(value) for name, value in weights.metadata.items()},
    }


def check_free(*paths: Path) -> None:
    """Return if these files can be made.

    Raises:
        CheckpointError: one exists, or is no `.safetensors`.
    """
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: only .safetensors is written; give a file name that ends so.")
        if path.exists():
            raise CheckpointError(f"{path}: exists; give a new file.")


def _file_of(out: Path, expert: str | None) -> Path:
    return out.with_name(f"{out.stem}_{expert}{out.suffix}") if expert else out


def _with_magnitudes_for(weights: LoraWeights, layout: str, base: Mapping[str, TensorStream] | None) -> LoraWeights:
    over_base = _OVER_BASE.get(layout)
    if over_base is None or not weights.uses_dora:
        return weights
    if base is None and any(
        m.magnitude is not None and m.magnitude_over_base != over_base for m in weights.modules.values()
    ):
        raise ModelError(
            f"--format {layout}: its readers take DoRA's magnitudes relative to the base model; give it by --base."
        )
    return with_magnitudes(weights, base or {}, over_base=over_base)


def with_magnitudes(weights: LoraWeights, base: Mapping[str, TensorStream], *, over_base: bool) -> LoraWeights:
    """Return a LoRA whose magnitudes, if any, are as one kind of reader takes them.

    Args:
        weights: the LoRA.
        base: weights by diffusers' names of the model that it was trained on; one in memory at a time.
        over_base: as ComfyUI and kohya take them, and not as peft and diffusers do.

    Raises:
        ModelError: it is a LoRA of another model.
    """
    modules = {}
    for stem, module in weights.modules.items():
        if module.magnitude is None or module.magnitude_over_base == over_base:
            modules[stem] = module
            continue
        found = base.get(f"{stem}.weight")
        if found is None or found.shape != (module.b.shape[0], *module.a.shape[1:]):
            shape = "absent" if found is None else list(found.shape)
            raise ModelError(f"{stem}.weight is {shape} in the base model; the DoRA is of another variant.")
        magnitude = magnitude_over(_whole(found), module, over_base=over_base)
        modules[stem] = dataclasses.replace(module, magnitude=magnitude, magnitude_over_base=over_base)
    return dataclasses.replace(weights, modules=modules)


def _whole(tensor: TensorStream) -> torch.Tensor:
    return torch.cat([chunk.float() for chunk in tensor.chunks()]).reshape(tensor.shape)


def _change_norm(module: LoraModule) -> float:
    # |B A|^2 = trace(B^T B A A^T), which needs matrices of the rank's size only.
    a, b = module.a.flatten(1).double(), module.b.flatten(1).double()
    return abs(module.scale) * float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def _without_number(name: str) -> str:
    parts = name.split(".")
    return ".".join(["blocks.*", *parts[2:]]) if parts[0] == "blocks" else name


def _decoded(value: str) -> Any:
    try:
        return json.loads(value) if value.startswith(("{", "[")) else value
    except ValueError:
        return value
