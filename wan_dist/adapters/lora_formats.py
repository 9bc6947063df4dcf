"""The tensors and header strings of LoRA files, as each program expects them.

diffusers and ComfyUI take a file without alpha as alpha = rank, each in silence, and diffusers reads alpha keys only
beside the block's linear layers. So the default multiplies the scale into B and writes no alpha: that loads with the
right strength in both, for every choice of targets.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_dist.adapters.lora_files import DIFFUSERS_METADATA_KEY, LoraModule, LoraWeights
from wan_dist.core.errors import ModelError
from wan_dist.models.wan.keys import module_to_original

KOHYA_MODULE = "networks.lora_wan"


@dataclass(frozen=True)
class LoraLayout:
    """One format of LoRA files.

    Attributes:
        name: as the command line has it.
        entries: module name and module to tensors by key.
        bakes_scale: the scale is in B, so that a header must say alpha = rank.
        carries_dora: programs that read it apply the magnitudes.
        header: further header strings.
    """

    name: str
    entries: Callable[[str, LoraModule], dict[str, Tensor]]
    bakes_scale: bool
    carries_dora: bool
    header: Callable[[Mapping[str, LoraModule]], dict[str, str]]


def lora_tensors(weights: LoraWeights, layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file.

    Args:
        weights: the LoRA; magnitudes as the layout's readers take them (`dora_for_comfyui`, `dora_for_peft`).
        layout: a key of `LAYOUTS`.
        dtype: of every matrix; alphas are fp32.

    Raises:
        ModelError: the LoRA is a DoRA and no reader of the layout applies magnitudes.
    """
    chosen = LAYOUTS[layout]
    if weights.uses_dora and not chosen.carries_dora:
        able = ", ".join(name for name, other in LAYOUTS.items() if other.carries_dora)
        raise ModelError(
            f"--format {layout}: its readers drop DoRA's magnitudes in silence; use {able}, or merge the LoRA."
        )
    tensors: dict[str, Tensor] = {}
    for name, module in weights.modules.items():
        for key, tensor in chosen.entries(name, module).items():
            exact = key.endswith(".alpha") or tensor.dtype == dtype
            tensors[key] = (tensor if exact else tensor.to(dtype)).contiguous()
    return tensors


def lora_header(weights: LoraWeights, layout: str) -> dict[str, str]:
    """Return the header strings that readers of LoRA files look for: kohya's minimum and the layout's own.

    Source: kohya-ss `networks/lora.py: save_weights`, musubi-tuner `networks/lora_wan.py`.
    """
    chosen = LAYOUTS[layout]
    rank = Counter(module.rank for module in weights.modules.values()).most_common(1)[0][0]
    alpha = rank if chosen.bakes_scale else _most_common_alpha(weights.modules)
    return {
        "ss_base_model_version": "wan2.2",
        "ss_network_module": KOHYA_MODULE,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_args": json.dumps({}),
        **chosen.header(weights.modules),
    }


def _most_common_alpha(modules: Mapping[str, LoraModule]) -> float:
    return Counter(module.alpha for module in modules.values()).most_common(1)[0][0]


def _no_header(modules: Mapping[str, LoraModule]) -> dict[str, str]:
    return {}


def _original_name(module: str) -> str:
    name = module_to_original(module)
    assert name is not None  # the reader and the trainer let no other module in
    return name


def _original(name: str, module: LoraModule) -> dict[str, Tensor]:
    stem = f"diffusion_model.{_original_name(name)}"
    return {f"{stem}.lora_A.weight": module.a, f"{stem}.lora_B.weight": module.b.float() * module.scale}


def _with_alpha(stem: str, module: LoraModule) -> dict[str, Tensor]:
    entries = {
        f"{stem}.lora_down.weight": module.a,
        f"{stem}.lora_up.weight": module.b,
        f"{stem}.alpha": torch.tensor(module.alpha, dtype=torch.float32),
    }
    if module.magnitude is not None:
        entries[f"{stem}.dora_scale"] = module.magnitude.reshape(-1, *[1] * (module.a.dim() - 1))
    return entries


def _comfyui(name: str, module: LoraModule) -> dict[str, Tensor]:
    return _with_alpha(f"diffusion_model.{_original_name(name)}", module)


def _kohya(name: str, module: LoraModule) -> dict[str, Tensor]:
    return _with_alpha(f"lora_unet_{_original_name(name).replace('.', '_')}", module)


def _diffusers(name: str, module: LoraModule) -> dict[str, Tensor]:
    entries = {f"transformer.{name}.lora_A.weight": module.a, f"transformer.{name}.lora_B.weight": module.b}
    if module.magnitude is not None:
        entries[f"transformer.{name}.lora_magnitude_vector"] = module.magnitude
    return entries


def _diffusers_header(modules: Mapping[str, LoraModule]) -> dict[str, str]:
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    alpha = _most_common_alpha(modules)
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "rank_pattern": {f"^{name}": module.rank for name, module in modules.items() if module.rank != rank},
        "alpha_pattern": {f"^{name}": module.alpha for name, module in modules.items() if module.alpha != alpha},
        "use_dora": any(module.magnitude is not None for module in modules.values()),
    }
    return {DIFFUSERS_METADATA_KEY: json.dumps({f"transformer.{key}": value for key, value in settings.items()})}


LAYOUTS = {
    layout.name: layout
    for layout in (
        LoraLayout("original", _original, bakes_scale=True, carries_dora=False, header=_no_header),
        LoraLayout("comfyui", _comfyui, bakes_scale=False, carries_dora=True, header=_no_header),
        LoraLayout("diffusers", _diffusers, bakes_scale=False, carries_dora=True, header=_diffusers_header),
        LoraLayout("kohya", _kohya, bakes_scale=False, carries_dora=True, header=_no_header),
    )
}
