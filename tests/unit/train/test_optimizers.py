from dataclasses import replace

import pytest
import torch
from torch import nn

from wan_dist.config.schema import OptimConfig
from wan_dist.train.optimizers import OPTIMIZERS, OptimizerOptions

OPTIONS = OptimizerOptions(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, offloaded=False)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))


def test_every_name_of_the_config_has_a_builder() -> None:
    assert set(OptimConfig.model_json_schema()["properties"]["name"].get("enum", ["adamw"])) == set(OPTIMIZERS)


def test_adamw_steps_as_its_paper_says() -> None:
    """First step: decay by lr * weight_decay, then lr in the direction of the gradient's sign (arXiv:1711.05101)."""
    weights = parameter()
    weights.grad = torch.tensor([0.5, -0.01, 4.0])
    OPTIMIZERS["adamw"]([weights], OPTIONS).step()
    expected = torch.tensor([1.0, -2.0, 3.0]) * (1 - 0.1 * 0.2) - 0.1 * torch.tensor([1.0, -1.0, 1.0])
    # eps is 1e-4 of the smallest gradient.
    assert torch.allclose(weights.detach(), expected, atol=2e-5)


def test_options_reach_the_optimizer() -> None:
    [group] = OPTIMIZERS["adamw"]([parameter()], OPTIONS).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.2)


def test_offload_without_a_compiler_says_so_and_steps_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    optimizer = OPTIMIZERS["adamw"]([parameter()], replace(OPTIONS, offloaded=True))
    assert type(optimizer) is torch.optim.AdamW
    assert "no C++ compiler" in caplog.text
