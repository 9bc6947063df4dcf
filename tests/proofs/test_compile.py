"""Compiled blocks give the gradients of eager ones, with each kind of checkpointing."""

import shutil
from typing import Any

import pytest
import torch

from wan_dist.models.wan.build import build_transformer
from wan_dist.models.wan.compact import bind_compact
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import get_variant
from wan_dist.train.blocks import checkpoint_blocks, compile_blocks

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"),
]
# fp32; fused kernels add in another order, and two blocks amplify it.
RELATIVE = 1e-4


def _gradients(model: Any, mode: str, first: torch.Tensor | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(2, 48, 3, 4, 6, generator=generator), torch.randn(2, 512, 64, generator=generator)
    model.disable_gradient_checkpointing()
    with checkpoint_blocks(model, mode, offload=False)():
        out = predict_velocity(model, noisy, torch.tensor([731.25, 12.5]), text, None, first)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"out": out.detach(), **found}


def test_compiled_blocks_give_the_gradients_of_eager_ones() -> None:
    torch.manual_seed(0)
    model: Any = build_transformer(get_variant("ti2v-5B")).train()
    bind_compact(model)
    cases = [(mode, first) for mode in ("none", "block", "attention") for first in (None, torch.zeros(2))]
    eager = [_gradients(model, *case) for case in cases]
    before = [block.forward for block in model.blocks]
    compile_blocks(model)
    assert all(block.forward is not old for block, old in zip(model.blocks, before, strict=True))
    for case, theirs in zip(cases, eager, strict=True):
        ours = _gradients(model, *case)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if not name.endswith("to_k.bias"):  # moves every score of a row alike: its gradient is rounding
                difference = float((value - theirs[name]).norm())
                assert difference <= RELATIVE * float(theirs[name].norm()), f"{name}, {case[0]}: {difference}"
