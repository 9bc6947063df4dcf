"""Low-rank adapters on a transformer, by peft.

The weights of a target W become W + scale * B @ A, scale = alpha / rank (alpha / sqrt(rank) with rsLoRA).
Sources: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wan_dist.adapters.lora_files import LoraWeights
from wan_dist.core.errors import ConfigError

ADAPTER_NAME = "default"
PRESETS = {
    "attention": (r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",),
    "blocks": (r"blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))",),
    "all": (r".*",),
}


@dataclass(frozen=True)
class LoraSpec:
    """How adapters are shaped.

    Attributes:
        rank: rows of A, columns of B.
        alpha: numerator of the scale.
        dropout: share of the adapter's input values that are zeroed in training.
        targets: a key of `PRESETS`, or regular expressions over whole module names.
        use_rslora: scale by alpha / sqrt(rank).
        use_dora: train the magnitude of each output row too.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str | tuple[str, ...]
    use_rslora: bool
    use_dora: bool

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def target_modules(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the linear layers that get adapters, in the model's order.

    Args:
        model: the transformer, before adapters.
        targets: a key of `PRESETS`, or regular expressions, each of which must match some whole name.
    Raises:
        ConfigError: an expression matches no linear layer.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    patterns = PRESETS[targets] if isinstance(targets, str) else tuple(targets)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            shown = ", ".join(names[:3])
            raise ConfigError(
                f"method.targets: {pattern!r} matches none of the transformer's {len(names)} linear layers; names look "
                f"like {shown}; use attention, blocks, all, or expressions that match whole names."
            )
    return [name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]


def add_lora(model: Any, spec: LoraSpec, *, seed: int) -> list[str]:
    """Freeze a diffusers transformer, add adapters (B is zero), and return the names of their target modules.

    Under ZeRO-3 call it after the model was built and filled: inside `zero.Init` peft zeroes a B of no elements, and
    B starts as noise (deepspeed 0.19.8, peft 0.21).

    Args:
        model: a `WanTransformer3DModel`.
        spec: their shape.
        seed: seed of A, so that any number of ranks starts from the same one.
    Raises:
        ConfigError: a target matches nothing.
    """
    from peft import LoraConfig

    names = target_modules(model, spec.targets)
    model.requires_grad_(False)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft only divides by the rank; a fraction works
        lora_dropout=spec.dropout,
        target_modules=names,
        use_rslora=spec.use_rslora,
        use_dora=spec.use_dora,
    )
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model.add_adapter(config, adapter_name=ADAPTER_NAME)
    return names


@torch.no_grad()
def continue_from(model: nn.Module, spec: LoraSpec, names: Sequence[str], found: LoraWeights, where: str) -> None:
    """Put the weights of an existing LoRA into the adapters, its strength kept.

    Args:
        model: with adapters of `spec`, not yet partitioned.
        spec: shape of the adapters.
        names: their target modules.
        found: the LoRA; a DoRA with magnitudes as peft takes them.
        where: what to call it in messages.
    Raises:
        ConfigError: other targets, another rank, or a magnitude too many or too few.
    """
    missing, unknown = sorted(set(names) - set(found.modules)), sorted(set(found.modules) - set(names))
    if missing or unknown:
        what = f"has nothing for {missing[0]}" if missing else f"has {unknown[0]}, which is no target"
        raise ConfigError(
            f"{where}: {what}; method.targets must be what it was trained on ({len(found.modules)} layers)."
        )
    parameters = dict(model.named_parameters())
    for name in names:
        module = found.modules[name]
        a, b = (parameters[f"{name}.lora_{part}.{ADAPTER_NAME}.weight"] for part in "AB")
        if module.rank != spec.rank:
            raise ConfigError(f"{where}: {name} has rank {module.rank}, method.rank is {spec.rank}; use {module.rank}.")
        if (module.magnitude is not None) != spec.use_dora:
            raise ConfigError(f"{where}: {name}: DoRA or not must be the same; set method.dora: {not spec.use_dora}.")
        if (a.shape, b.shape) != (module.a.shape, module.b.shape):
            raise ConfigError(f"{where}: {name} is for a weight of another shape; it is of another variant.")
        a.copy_(module.a)
        b.copy_(module.b.float() * (module.scale / spec.scale))
        if module.magnitude is not None:
            assert not module.magnitude_over_base  # the caller has the base weights to divide by
            parameters[f"{name}.lora_magnitude_vector.{ADAPTER_NAME}.weight"].copy_(module.magnitude.flatten())
