"""The counted operations are those that torch counts."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.flops import block_flops


def test_a_forward_pass_through_the_blocks_is_counted_as_torch_counts_it(tmp_path: Path) -> None:
    folder = make_tiny_pipeline("t2v-A14B", tmp_path / "model", ["a red circle"])
    model = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    num_tokens = 3 * 4 * 5
    hidden, text = torch.randn(1, num_tokens, width), torch.randn(1, 512, width)
    rotary = model.rope(torch.zeros(1, 16, 3, 8, 10))
    # The CPU's fused attention is not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for block in model.blocks:
            block(hidden, text, torch.randn(1, 6, width), rotary)
    ours = block_flops(model.config, num_tokens)
    assert ours.forward == pytest.approx(counter.get_total_flops(), rel=1e-12)
    # Twice the forward again for the backward; without weight gradients once less of the matrices.
    assert ours.training(all_weights=True) == 3 * ours.forward
    assert ours.training(all_weights=False) == 2 * ours.matmul + 3 * ours.attention
    assert ours.recomputed("block") == ours.forward
    assert ours.recomputed("attention") == ours.matmul


def test_the_full_models_are_as_large_as_known() -> None:
    config = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824}
    # t2v-A14B at 81 frames of 832x480, MaxDiffusion's log: 19,573 TFLOP is 3 forward passes at 1280x720.
    assert block_flops(config, 32_760).training(all_weights=True) / 1e12 == pytest.approx(5035, abs=1)
    assert block_flops(config, 75_600).training(all_weights=True) / 1e12 == pytest.approx(19_573, abs=5)
