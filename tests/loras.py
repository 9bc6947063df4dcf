"""Trained-looking LoRAs on tiny transformers: peft's own model, its output, and the record that ours makes of it."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from wan_dist.adapters.lora_files import LoraModule, LoraWeights
from wan_dist.models.wan.build import build_transformer
from wan_dist.models.wan.variants import get_variant

_BLOCKS = r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
TARGETS = {
    "full": _BLOCKS,
    "attention": r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",
    "qv": r"blocks\.\d+\.attn[12]\.to_(q|v)",
    "all": _BLOCKS + r"|proj_out|condition_embedder\..*(linear_[12]|time_proj)",
}
RANK, ALPHA = 4, 16.0


@dataclass(frozen=True)
class Trained:
    """A transformer with peft's adapters in it, as training leaves it."""

    model: Any
    weights: LoraWeights
    settings: dict[str, Any]


def tiny_transformer(variant: str = "t2v-A14B", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_transformer(get_variant(variant))


def inputs_of(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, 2, 4, 4, generator=generator).to(dtype),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 8, model.config.text_dim, generator=generator).to(dtype),
    }


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    """Return the velocity for fixed inputs, [1, C, 2, 4, 4] fp32."""
    return model(**inputs_of(model, model.dtype), return_dict=False)[0].float()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def trained_lora(
    variant: str = "t2v-A14B",
    targets: str = "full",
    *,
    seed: int = 0,
    adapter_seed: int = 1,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> Trained:
    """Return a tiny transformer whose adapters have a B that is not zero, and alpha that is not the rank."""
    model = tiny_transformer(variant, seed)
    config = LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        target_modules=TARGETS[targets],
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    torch.manual_seed(adapter_seed)
    model.add_adapter(config)
    modules = {}
    scale = ALPHA / (RANK**0.5 if use_rslora else RANK)
    with torch.no_grad():
        for name, module in model.named_modules():
            if not hasattr(module, "lora_B"):
                continue
            b = module.lora_B["default"].weight
            b.copy_(torch.randn_like(b) * 0.1)
            magnitude = None
            if use_dora:
                vector = module.lora_magnitude_vector["default"].weight
                vector.mul_(1 + 0.2 * torch.rand_like(vector))
                magnitude = vector.detach().clone()
            modules[name] = LoraModule(module.lora_A["default"].weight.detach(), b.detach(), scale, magnitude)
    settings = {"rank": RANK, "alpha": ALPHA, "use_rslora": use_rslora, "use_dora": use_dora}
    return Trained(model.eval(), LoraWeights(modules, "peft"), settings | {"targets": list(modules)})
