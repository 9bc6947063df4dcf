import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from wan_dist.config.schema import OptimConfig
from wan_dist.core.errors import ConfigError
from wan_dist.train.optimizers import (
    OPTIMIZERS,
    OptimizerKind,
    OptimizerOptions,
    build_optimizer,
    check_extra,
    set_learning_rate,
)

OPTIONS = OptimizerOptions(lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, offloaded=False)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))


def build(name: str, options: OptimizerOptions = OPTIONS, **parameters: nn.Parameter) -> Any:
    return build_optimizer(name, (parameters or {"weight": parameter()}).items(), options)


def test_every_name_of_the_config_has_a_builder() -> None:
    assert OptimConfig.model_json_schema()["properties"]["name"]["enum"] == list(OPTIMIZERS)


def test_adamw_steps_as_its_paper_says() -> None:
    """First step: decay by lr * weight_decay, then lr in the direction of the gradient's sign (arXiv:1711.05101)."""
    weights = parameter()
    weights.grad = torch.tensor([0.5, -0.01, 4.0])
    build("adamw", weight=weights).step()
    expected = torch.tensor([1.0, -2.0, 3.0]) * (1 - 0.1 * 0.2) - 0.1 * torch.tensor([1.0, -1.0, 1.0])
    # eps is 1e-4 of the smallest gradient.
    assert torch.allclose(weights.detach(), expected, atol=2e-5)


def test_options_reach_the_optimizer() -> None:
    [group] = build("adamw").param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.9), 1e-6, 0.2)
    [group] = build("adamw", replace(OPTIONS, extra={"amsgrad": True})).param_groups
    assert group["amsgrad"]
    [group] = build("prodigy", replace(OPTIONS, zero_stage=0, extra={"d0": 1e-4})).param_groups
    assert group["d"] == 1e-4


def test_biases_norms_and_tables_can_be_left_without_decay() -> None:
    matrix = nn.Parameter(torch.zeros(2, 2))
    named = {
        "blocks.0.attn1.to_q.weight": matrix,
        "blocks.0.attn1.to_q.bias": parameter(),
        "blocks.0.attn1.norm_q.weight": parameter(),
        "blocks.0.norm2.weight": nn.Parameter(torch.zeros(2, 2)),
        "blocks.0.scale_shift_table": nn.Parameter(torch.zeros(1, 6, 2)),
    }
    decayed, rest = build_optimizer("adamw", named.items(), replace(OPTIONS, decay="matrices")).param_groups
    assert decayed["params"] == [matrix]
    assert (decayed["weight_decay"], rest["weight_decay"], len(rest["params"])) == (0.2, 0.0, 4)


def test_muon_takes_the_matrices_inside_of_blocks_and_adamw_the_rest_at_its_own_rate() -> None:
    matrix = nn.Parameter(torch.zeros(2, 2))
    named = {"blocks.0.to_q.weight": matrix, "blocks.0.to_q.bias": parameter(), "proj_out.weight": parameter()}
    optimizer = build_optimizer("muon", named.items(), replace(OPTIONS, extra={"adam_lr": 0.01}))
    muon, adam = optimizer.param_groups
    assert muon["params"] == [matrix]
    assert (muon["use_muon"], adam["use_muon"], len(adam["params"])) == (True, False, 2)
    set_learning_rate(optimizer, 0.05)
    assert (muon["lr"], adam["lr"]) == (0.05, pytest.approx(0.005))


@pytest.mark.parametrize(
    ("name", "extra", "message"),
    [
        ("adamw", {"amsgrat": True}, r"optim\.options\.amsgrat: adamw takes no such argument; did you mean amsgrad\?"),
        ("adamw", {"lr": 1.0}, r"optim\.options\.lr: set optim\.lr instead"),
        ("prodigy", {"add_over_ranks": None}, "takes no such argument"),
        ("muon", {"nesterov": True}, "takes momentum, ns_method, adam_lr"),
        ("lion", {"anything": 1}, "lion takes no such argument"),  # its class would swallow it
        ("adafactor", {"eps": [None, 1e-3]}, None),
        ("schedule_free", {"r": 1.0}, None),
        ("adamw_8bit", {"percentile_clipping": 5}, "takes no such argument"),
    ],
)
def test_further_arguments_are_those_of_the_class(name: str, extra: dict[str, Any], message: str | None) -> None:
    if message is None:
        check_extra(name, extra)
        return
    with pytest.raises(ConfigError, match=message):
        check_extra(name, extra)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    for name in ("lion", "adamw_8bit"):
        with pytest.raises(ConfigError, match=r"pip install 'wan_dist\[optimizers\]'"):
            check_extra(name, {})


def test_a_new_optimizer_is_one_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=options.lr, **options.extra)

    monkeypatch.setitem(OPTIMIZERS, "toy", OptimizerKind(toy, lambda: torch.optim.SGD))
    check_extra("toy", {"momentum": 0.5})
    weights = parameter()
    weights.grad = torch.ones(3)
    build("toy", replace(OPTIONS, extra={"momentum": 0.5}), weight=weights).step()
    assert torch.allclose(weights.detach(), torch.tensor([0.9, -2.1, 2.9]))


def test_offload_without_a_compiler_says_so_and_steps_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    optimizer = build("adamw", replace(OPTIONS, offloaded=True))
    assert type(optimizer) is torch.optim.AdamW
    assert "no C++ compiler" in caplog.text
