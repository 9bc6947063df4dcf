"""Two timesteps per sample against diffusers' forward with a timestep per token: outputs and every gradient."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig

from wan_dist.models.wan.build import build_transformer
from wan_dist.models.wan.compact import _laid_out, bind_compact
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import get_variant

PER_FRAME, NUM_TOKENS = 2 * 3, 3 * 2 * 3


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    return build_transformer(get_variant("ti2v-5B")).train()


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(3, 48, 3, 4, 6, generator=generator).to(dtype)
    text = torch.randn(3, 512, 64, generator=generator).to(dtype)
    # A given first frame, none, and one whose noise level happens to be tiny.
    return {
        "noisy": noisy,
        "text": text,
        "first": torch.tensor([0.0, 12.5, 0.0]),
        "rest": torch.tensor([731.25, 12.5, 0.5]),
    }


def per_token(x: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [x["first"][:, None].expand(-1, PER_FRAME), x["rest"][:, None].expand(-1, NUM_TOKENS - PER_FRAME)], 1
    )


def both(
    theirs: Any, dtype: torch.dtype, checkpointing: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Output and gradients of diffusers' forward, and of ours."""
    x, results = inputs(dtype), []
    for ours in (False, True):
        model = copy.deepcopy(theirs).to(dtype)
        if checkpointing:
            model.enable_gradient_checkpointing()
        if ours:
            bind_compact(model)
            out = predict_velocity(model, x["noisy"], x["rest"], x["text"], None, x["first"])
        else:
            out = model(x["noisy"], per_token(x), x["text"], return_dict=False)[0]
        (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append({"out": out.detach(), **gradients})
    return results[0], results[1]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_outputs_and_gradients_equal_per_token_timesteps(theirs, checkpointing, lora):
    model = copy.deepcopy(theirs)
    if lora:
        model.add_adapter(
            LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "ffn.net.2"], init_lora_weights=False)
        )
    expected, found = both(model, torch.float32, checkpointing)
    assert expected.keys() == found.keys()
    assert any("lora" in name for name in found) == lora
    for name, value in expected.items():
        assert value is not None, name
        # fp32: the same operations; only sums over tokens, in the gradients of the two rows, are ordered differently.
        scale = float(value.abs().max())
        assert float((found[name] - value).abs().max()) <= 1e-5 * scale + 1e-9, name
    torch.testing.assert_close(found["out"], expected["out"], rtol=1e-6, atol=1e-6)


def test_bf16_outputs_equal_per_token_timesteps(theirs):
    expected, found = both(theirs, torch.bfloat16, False)
    # Element by element the same roundings; a matmul over 2 rows may round its bf16 result elsewhere than over 18.
    torch.testing.assert_close(found["out"].float(), expected["out"].float(), rtol=2e-2, atol=2e-2)


def test_without_a_first_timestep_the_forward_is_diffusers_own(theirs):
    x, model = inputs(torch.float32), copy.deepcopy(theirs)
    bind_compact(model)
    with torch.no_grad():
        expected = theirs(x["noisy"], x["rest"], x["text"], return_dict=False)[0]
        assert torch.equal(predict_velocity(model, x["noisy"], x["rest"], x["text"], None), expected)
        assert torch.equal(model(x["noisy"], x["rest"], x["text"]).sample, expected)


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 9, 18])
def test_parts_of_the_tokens_get_the_rows_of_their_frames(parts):
    rows = torch.stack([torch.full((6, 1), 10.0), torch.full((6, 1), 20.0)])[None]
    length = NUM_TOKENS // parts
    found = []
    for part in range(parts):
        laid = _laid_out(rows, length, (PER_FRAME, part * length))[0]
        chunks = laid.shape[1]
        assert length % chunks == 0
        found.append(laid.expand(-1, -1, length // chunks, -1).flatten())
    assert torch.equal(torch.cat(found), torch.tensor([10.0] * PER_FRAME + [20.0] * (NUM_TOKENS - PER_FRAME)))
