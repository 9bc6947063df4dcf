"""ComfyUI's application of a LoRA file to WAN, written again from what its source documents.

`comfy/lora.py: model_lora_keys_unet` offers for each weight of the model its name without `.weight`, behind
`diffusion_model.` as it is and behind `lora_unet_` with underscores; `comfy/weight_adapter/lora.py` takes
`lora_up/lora_down` or `lora_B/lora_A` there, `.alpha` over the rank or 1, and `.dora_scale` over the norm of the rows
of the weight (`comfy/weight_adapter/base.py: weight_decompose`, v0.3.77).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wan_dist.models.wan.keys import tensor_to_original


def patched_state_dict(model: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a diffusers model's tensors with the LoRA added as ComfyUI would, and the file's keys that it ignores."""
    unused = set(lora)
    patched = {}
    for name, weight in model.items():
        original = tensor_to_original(name)
        assert original is not None
        stem = original.removesuffix(".weight")
        for key in (f"lora_unet_{stem.replace('.', '_')}", f"diffusion_model.{stem}"):
            if original.endswith(".weight"):
                weight = _patch(weight, key, lora, unused)
        patched[name] = weight
    return patched, sorted(unused)


def _patch(weight: Tensor, key: str, lora: Mapping[str, Tensor], unused: set[str]) -> Tensor:
    for up_name, down_name in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
        up, down = f"{key}.{up_name}.weight", f"{key}.{down_name}.weight"
        if up not in lora:
            continue
        unused -= {up, down, f"{key}.alpha", f"{key}.dora_scale"}
        alpha = lora.get(f"{key}.alpha")
        scale = 1.0 if alpha is None else alpha.item() / lora[down].shape[0]
        change = torch.mm(lora[up].flatten(1).float(), lora[down].flatten(1).float()).reshape(weight.shape) * scale
        dora_scale = lora.get(f"{key}.dora_scale")
        if dora_scale is None:
            return weight + change
        rows = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True)
        return (weight + change) * (dora_scale / (rows + torch.finfo(weight.dtype).eps))
    return weight
