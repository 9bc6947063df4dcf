"""LoRA files and trained words into a loaded pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_dist.adapters.lora_files import LoraWeights, check_expert, read_lora
from wan_dist.adapters.lora_math import magnitude_over
from wan_dist.core.errors import ModelError
from wan_dist.models.wan.keys import takes_lora
from wan_dist.models.wan.transformer import EXPERT_FOLDERS


def add_loras(pipeline: Any, component: str, loras: Sequence[tuple[Path, float]]) -> None:
    """Load LoRA files of any format into a transformer, all active at their strengths.

    diffusers' own loader fails on some of these files (kohya's with a part of the targets, alpha keys beside the
    embedders), so it gets the matrices with the scale in B.

    Args:
        pipeline: of diffusers; changed in place.
        component: transformer, or transformer_2 for the low-noise expert.
        loras: files with their multipliers.

    Raises:
        ModelError: the pipeline has no such transformer, or a file cannot be read, does not fit or is misplaced.
    """
    if not loras:
        return
    transformer = getattr(pipeline, component, None)
    if transformer is None:
        raise ModelError(f"the pipeline has no {component}; --lora-low is for models with two experts.")
    two = getattr(pipeline, "transformer_2", None) is not None
    expert = next((name for name, folder in EXPERT_FOLDERS.items() if two and folder == component), None)
    layers = dict(transformer.named_modules())
    names = []
    for number, (path, _) in enumerate(loras):
        weights = read_lora(path, component)
        check_expert(path, weights.expert, expert)
        _check_fits(path, weights, layers)
        names.append(f"lora_{number}")
        pipeline.load_lora_into_transformer(_tensors(weights, layers), transformer, adapter_name=names[-1])
    transformer.set_adapters(names, [multiplier for _, multiplier in loras])


def _check_fits(path: Path, weights: LoraWeights, layers: dict[str, Any]) -> None:
    for name, module in weights.modules.items():
        base = layers[name].weight if name in layers and takes_lora(name) else None
        if base is None or (base.shape[0], *base.shape[1:]) != (module.b.shape[0], *module.a.shape[1:]):
            found = "absent" if base is None else f"{list(base.shape)}"
            raise ModelError(f"{path}: {name} is {found} in this model; the LoRA is of another variant.")


def _tensors(weights: LoraWeights, layers: dict[str, Any]) -> dict[str, Any]:
    tensors = {}
    for name, module in weights.modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = module.a
        tensors[f"transformer.{name}.lora_B.weight"] = (module.b.float() * module.scale).to(module.b.dtype)
        if module.magnitude is not None:
            base = layers[name].weight.detach().cpu() if module.magnitude_over_base else module.a
            tensors[f"transformer.{name}.lora_magnitude_vector"] = magnitude_over(base, module, over_base=False)
    return tensors
