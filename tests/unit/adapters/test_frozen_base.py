"""Frozen weights of fewer bits: the run equals one whose weights were quantised and restored by hand."""

import copy
import sys
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import nn

from wan_dist.adapters.frozen_base import BaseDtype, FrozenLinear, from_fp8, quantise_blocks, to_fp8
from wan_dist.adapters.lora import LoraSpec, add_lora
from wan_dist.core.errors import ConfigError
from wan_dist.models.wan.build import build_transformer
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import get_variant
from wan_dist.train.blocks import checkpoint_blocks

CPU = torch.device("cpu")
SPEC = LoraSpec(rank=4, alpha=8.0, dropout=0.0, targets="blocks", use_rslora=False, use_dora=False)


def by_hand(weight: torch.Tensor, kind: BaseDtype) -> torch.Tensor:
    """Return a weight quantised and restored, row by row and from the format's definition for fp8."""
    if kind == "nf4":
        return dequantize_4bit(*quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True))
    rows = []
    for row in weight:
        scale = 2.0 ** float(torch.ceil(torch.log2(row.abs().max() / 448)))
        rows.append((row / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.stack(rows)


def with_adapters() -> Any:
    torch.manual_seed(0)
    model: Any = build_transformer(get_variant("t2v-A14B")).train()
    add_lora(model, SPEC, seed=0)
    with torch.no_grad():  # B starts at zero, and A would get no gradient
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 3, 4, 4, generator=generator), torch.randn(1, 512, 64, generator=generator)
    loss = predict_velocity(model, latents, torch.full((1,), 700.0), text, None).square().mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize("checkpointing", ["none", "attention"])
def test_loss_and_gradients_are_those_of_weights_quantised_by_hand(kind: BaseDtype, checkpointing: str) -> None:
    ours = with_adapters()
    theirs = copy.deepcopy(ours)
    plain = gradients(copy.deepcopy(ours))["loss"]
    with torch.no_grad():
        for name, module in theirs.blocks.named_modules():
            if isinstance(module, nn.Linear) and "lora_" not in name:
                module.weight.copy_(by_hand(module.weight, kind))
    quantise_blocks(ours, kind, CPU)
    checkpoint_blocks(ours, checkpointing, offload=False)
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    assert {name.split(".")[-3] for name in found if name != "loss"} == {"lora_A", "lora_B"}
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-7)
    assert found["loss"] != plain
    assert float(found["loss"]) == pytest.approx(float(plain), rel=0.05)


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.26), ("nf4", 0.135)])
def test_bits_are_few_and_no_step_changes_them(kind: BaseDtype, most: float) -> None:
    """Of 32 bits 8 and 4 are left, beside scales; an optimizer sees the adapters, and a state dict nothing else new."""
    model = with_adapters()
    whole = sum(p.nbytes for n, p in model.blocks.named_parameters() if n.endswith(("base_layer.weight",)))
    quantise_blocks(model, kind, CPU)
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    assert len(layers) == 2 * 10
    assert sum(layer.stored.nbytes for layer in layers) < most * whole
    assert not any("stored" in name or "exponent" in name for name in model.state_dict())
    before = [layer.stored.clone() for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = gradients(model)["loss"]
    optimizer.step()
    model.zero_grad()
    assert gradients(model)["loss"] < first
    assert all(torch.equal(layer.stored, old) for layer, old in zip(layers, before, strict=True))


def test_fp8_rounds_by_no_more_than_its_mantissa() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 64)[:, None]
    weight[3] = 0.0
    restored = from_fp8(*to_fp8(weight), torch.float32)
    largest = weight.abs().amax(1, keepdim=True)
    # Three bits of mantissa; below 2^-6 of its range fp8 is evenly spaced, at 2^-9 / 448 of a row's largest at least.
    assert bool(((restored - weight).abs() <= weight.abs() / 16 + largest * 2.0**-9 / 224).all())
    assert torch.equal(from_fp8(*to_fp8(restored), torch.bfloat16).float(), restored)


def test_a_device_that_cannot_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.base_dtype = fp8: does not run on meta .*; remove it"):
        quantise_blocks(with_adapters(), "fp8", torch.device("meta"))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"nf4: bitsandbytes is needed .* pip install 'wan_dist\[optimizers\]'"):
        quantise_blocks(with_adapters(), "nf4", CPU)
