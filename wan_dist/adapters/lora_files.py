"""LoRA files of any trainer, read into one neutral record.

What is recognised: prefixes of diffusers (`transformer.`), the original code and ComfyUI (`diffusion_model.`), kohya
and musubi-tuner (`lora_unet_`, dots as underscores), peft (`base_model.model.`) and none at all (DiffSynth); modules
by diffusers' or the original names; `lora_A`/`lora_B`, `lora_down`/`lora_up`; alpha beside each module, in the header
(diffusers' `lora_adapter_metadata`), in peft's adapter_config.json, or nowhere, which means alpha = rank everywhere.
Sources: diffusers `loaders/lora_conversion_utils.py` and `loaders/peft.py`; ComfyUI `comfy/lora.py`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.core.errors import ModelError
from wan_dist.core.finite import is_finite
from wan_dist.models.wan.keys import (
    COMFYUI_PREFIX,
    flat_to_diffusers,
    module_to_diffusers,
    module_to_original,
    takes_lora,
    tensor_to_diffusers,
    tensor_to_original,
)

DIFFUSERS_METADATA_KEY = "lora_adapter_metadata"
EXPERT_KEY = "wan_dist.expert"
PEFT_WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_CONFIG_NAME = "adapter_config.json"

_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_DOTTED_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "base_model.model.",
    "transformer_2.",
    "transformer.",
    "pipe.dit.",
    "dit.",
)
_PART = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<kind>A|B|down|up)(?:\.\w+)?(?:\.weight)?"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|\.(?P<other>alpha|dora_scale)"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.\w+)*)"
)
_OTHER_METHODS = {
    ".diff": "whole-weight differences",
    ".diff_b": "bias differences",
    ".bias": "trained biases",
    ".hada_": "LoHa factors",
    ".lokr_": "LoKr factors",
    ".lora_mid": "convolution factors",
    ".oft_": "OFT blocks",
    ".reshape_weight": "reshaped weights",
}
_EXPERTS = ("high_noise", "low_noise")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class LoraModule:
    """The low-rank change of one weight W: W + scale * B @ A, its rows set to a trained length where DoRA was used.

    Attributes:
        a: [rank, in], any float dtype; a convolution's is [rank, in, ...].
        b: [out, rank]; a convolution's is [out, rank, 1, ...].
        scale: what B @ A is multiplied by.
        magnitude: [out], None without DoRA: the length of each row of the changed weight.
        magnitude_over_base: the rows are multiplied by magnitude / |W| instead of magnitude / |W + scale * B @ A|, as
            ComfyUI does (`comfy/weight_adapter/base.py: weight_decompose`).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    magnitude_over_base: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def alpha(self) -> float:
        """Numerator of the scale over the rank."""
        return self.scale * self.rank


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA of one transformer.

    Attributes:
        modules: by diffusers' module name, such as `blocks.0.attn1.to_q`.
        layout: what the file was recognised as: original, comfyui, kohya, diffusers, peft or bare.
        scale_stated: False where the file says nothing of its scale, so that alpha = rank was taken.
        metadata: strings of the file's header.
    """

    modules: dict[str, LoraModule]
    layout: str
    scale_stated: bool = True
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def uses_dora(self) -> bool:
        """Whether any module carries a magnitude."""
        return any(module.magnitude is not None for module in self.modules.values())

    @property
    def expert(self) -> str | None:
        """The expert that our own files name, None for others' files and for the only transformer."""
        return self.metadata.get(EXPERT_KEY)


def read_lora(path: Path, component: str | None = None) -> LoraWeights:
    """Return the LoRA of a safetensors file, or of a folder that peft wrote, whatever its naming.

    Args:
        path: a `.safetensors` file, or a folder with `adapter_model.safetensors` and `adapter_config.json`.
        component: transformer or transformer_2, where it matters: a file that holds both.

    Raises:
        ModelError: unreadable, not a LoRA of WAN, of a kind that is not low-rank, incomplete, or its scale is unknown.
    """
    if path.is_dir():
        if not (path / PEFT_WEIGHTS_NAME).is_file():
            raise ModelError(f"{path}: is a folder without peft's {PEFT_WEIGHTS_NAME}; name the LoRA's file.")
        path = path / PEFT_WEIGHTS_NAME
    tensors, metadata = _load(path)
    if tensors and all(_is_of_model(name) for name in tensors):
        raise ModelError(f"{path}: holds a model's whole weights and no LoRA.")
    tensors, named = _of_component(path, tensors, component)
    groups, layout = _group(path, tensors)
    config = _config(path, metadata, layout, named)
    stated = config is not None or any("alpha" in parts for parts in groups.values())
    modules = {stem: _module(path, stem, parts, config) for stem, parts in groups.items()}
    return LoraWeights(modules, layout, stated, metadata)


def check_expert(path: Path, named: str | None, expert: str | None) -> None:
    """Return if weights are not known to be for another expert.

    Args:
        path: their file, for messages.
        named: the expert that its header names, as our own files do (`wan_dist.expert`); None for others' files.
        expert: high_noise or low_noise, which it was given for; anything else is not checked.

    Raises:
        ModelError: its file names the other expert.
    """
    if expert in _EXPERTS and named in _EXPERTS and named != expert:
        raise ModelError(f"{path}: is for the {named} expert and was given for the {expert} one.")


def _is_of_model(name: str) -> bool:
    return bool(tensor_to_original(name) or tensor_to_diffusers(name.removeprefix(COMFYUI_PREFIX)))


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise ModelError(f"{path}: there is no such file; correct the path.")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors files are read; pickles (.pt, .bin, .ckpt) can run code.")
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}).") from None


def _of_component(
    path: Path, tensors: dict[str, Tensor], component: str | None
) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of the wanted transformer, and the name that the file gives it."""
    found = {name.partition(".")[0] for name in tensors} & {"transformer", "transformer_2"}
    if len(found) == 2 and component is None:
        raise ModelError(f"{path}: holds both transformer and transformer_2; say which of them is meant.")
    if component == "transformer" and found == {"transformer_2"}:
        raise ModelError(f"{path}: is for transformer_2, not for transformer.")
    if len(found) == 2:
        return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{component}.")}, component
    # diffusers names a file's only transformer `transformer`, whichever expert it is loaded into.
    return tensors, next(iter(found), None)


def _group(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], str]:
    """Return each module's parts (a, b, alpha, dora_scale, magnitude) by diffusers' name, and the layout."""
    groups: dict[str, dict[str, Tensor]] = {}
    layouts: set[str] = set()
    for key, tensor in tensors.items():
        for mark, what in _OTHER_METHODS.items():
            if key.endswith(mark) or (mark.endswith("_") and mark in key):
                raise ModelError(f"{path}: holds {what} ({key}); only low-rank A and B with alpha or DoRA are read.")
        match = _PART.fullmatch(key)
        if not match:
            raise ModelError(f"{path}: {key} is no part of a LoRA; is this file one?")
        stem, layout = _stem(match["stem"])
        if stem is None:
            raise ModelError(f"{path}: {key} names no module of WAN 2.2; the LoRA is of another model.")
        part = {"A": "a", "down": "a", "B": "b", "up": "b"}.get(match["kind"] or match["old"] or "")
        part = part or match["other"] or "magnitude"
        if layout == "original" and (match["kind"] in ("down", "up") or part in ("alpha", "dora_scale")):
            layout = "comfyui"
        layouts.add(layout)
        if part in groups.setdefault(stem, {}):
            raise ModelError(f"{path}: gives {part} of {stem} twice, the second time as {key}.")
        groups[stem][part] = tensor
    if not groups:
        raise ModelError(f"{path}: is empty.")
    layouts -= {"original"} if "comfyui" in layouts else set()
    return groups, layouts.pop() if len(layouts) == 1 else "mixed"


def _stem(name: str) -> tuple[str | None, str]:
    """Return diffusers' module name, None if there is no such module, and the layout that the naming belongs to."""
    for prefix in _FLAT_PREFIXES:
        if name.startswith(prefix):
            return flat_to_diffusers(name.removeprefix(prefix).lstrip("_")), "kohya"
    seen: set[str] = set()
    while prefix := next((p for p in _DOTTED_PREFIXES if name.startswith(p)), None):
        seen.add(prefix)
        name = name.removeprefix(prefix)
    module = name if module_to_original(name) else module_to_diffusers(name)
    if module is not None and not takes_lora(module):
        module = None
    if "base_model.model." in seen:
        return module, "peft"
    if seen & {"transformer.", "transformer_2."}:
        return module, "diffusers"
    return module, "original" if seen else "bare"


def _config(path: Path, metadata: Mapping[str, str], layout: str, component: str | None) -> dict[str, Any] | None:
    """Return peft's settings of the file, None where there are none."""
    beside = path.with_name(PEFT_CONFIG_NAME)
    try:
        if text := metadata.get(DIFFUSERS_METADATA_KEY):
            prefix = f"{component or 'transformer'}."
            settings = json.loads(text)
            chosen = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
            return chosen if "lora_alpha" in chosen else None
        if path.name == PEFT_WEIGHTS_NAME and beside.is_file():
            return json.loads(beside.read_text())
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: its adapter settings cannot be read ({error}).") from None
    if layout == "peft":
        raise ModelError(f"{path}: peft's naming without {PEFT_CONFIG_NAME} beside it, so its alpha is unknown.")
    return None


def _module(path: Path, stem: str, parts: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> LoraModule:
    if "a" not in parts or "b" not in parts:
        raise ModelError(f"{path}: {stem} has {', '.join(sorted(parts))} and lacks {'b' if 'a' in parts else 'a'}.")
    a, b = parts["a"], parts["b"]
    if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
        raise ModelError(f"{path}: {stem} is stored as {a.dtype}; only fp32, fp16 and bf16 are read.")
    if a.dim() < 2 or b.dim() < 2 or a.shape[0] != b.shape[1]:
        raise ModelError(f"{path}: {stem} has A {list(a.shape)} and B {list(b.shape)}, which do not multiply.")
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    if magnitude is not None and magnitude.numel() != b.shape[0]:
        raise ModelError(f"{path}: {stem} has {magnitude.numel()} magnitudes for {b.shape[0]} output rows.")
    numbers = [a, b, *([] if magnitude is None else [magnitude]), *([parts["alpha"]] if "alpha" in parts else [])]
    if not all(map(is_finite, numbers)):
        raise ModelError(f"{path}: {stem} holds values that are not finite.")
    scale = float(parts["alpha"].item()) / a.shape[0] if "alpha" in parts else _config_scale(config, stem, a.shape[0])
    return LoraModule(
        a, b, scale, None if magnitude is None else magnitude.reshape(-1), magnitude_over_base="dora_scale" in parts
    )


def _config_scale(config: Mapping[str, Any] | None, stem: str, rank: int) -> float:
    """Return a module's scale by peft's settings.

    Source: peft `utils/other.py: get_pattern_key`, `tuners/lora/layer.py: update_layer`.
    """
    if config is None:
        return 1.0
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", stem):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
