from typing import Any

import pytest

from wan_dist.core.errors import ConfigError
from wan_dist.parallel.ds_config import accumulation_steps, deepspeed_config


def config(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "micro_batch_size": 2,
        "accumulation_steps": 3,
        "world_size": 4,
        "dtype": "bf16",
        "max_grad_norm": 1.0,
        "zero_stage": 3,
        "offload_optimizer": "none",
        "offload_param": "none",
        "pin_memory": False,
        "extra": {},
    }
    return deepspeed_config(**{**values, **changes})


def test_batch_sizes_agree_and_the_silent_traps_are_set() -> None:
    made = config()
    assert made["train_batch_size"] == 24
    assert made["zero_optimization"]["stage"] == 3
    assert made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["checkpoint"]["tag_validation"] == "Fail"
    assert made["bf16"] == {"enabled": True}
    assert "bf16" not in config(dtype="fp32")


def test_offload_goes_where_asked() -> None:
    assert "offload_optimizer" not in config()["zero_optimization"]
    zero = config(offload_optimizer="cpu", offload_param="cpu", pin_memory=True)["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu", "pin_memory": True}


def test_further_keys_are_merged_without_changing_what_was_given() -> None:
    extra = {"zero_optimization": {"sub_group_size": 7}, "wall_clock_breakdown": True}
    made = config(extra=extra)
    assert made["zero_optimization"]["sub_group_size"] == 7
    assert made["zero_optimization"]["stage"] == 3
    assert made["wall_clock_breakdown"] is True
    assert extra == {"zero_optimization": {"sub_group_size": 7}, "wall_clock_breakdown": True}


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"bf16": {"enabled": False}}, "parallel.deepspeed.bf16.enabled = False"),
        ({"zero_optimization": {"stage": 2}}, "parallel.deepspeed.zero_optimization.stage = 2"),
        ({"zero_optimization": 3}, "parallel.deepspeed.zero_optimization = 3"),
        ({"train_batch_size": 24}, "parallel.deepspeed.train_batch_size = 24"),
        ({"gradient_clipping": 5}, "parallel.deepspeed.gradient_clipping = 5"),
    ],
)
def test_a_key_that_has_an_owner_is_refused_even_with_the_same_value(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="collides with the value wan_dist sets") as caught:
        config(extra=extra)
    assert str(caught.value).startswith(named)


def test_accumulation_divides_the_global_batch() -> None:
    assert accumulation_steps(24, 2, 4) == 3
    with pytest.raises(ConfigError, match=r"use 1 or 2 or 3 or 6 ranks, or a multiple of 8\.") as caught:
        accumulation_steps(12, 2, 4)
    assert "train.global_batch_size = 12 does not divide by micro_batch_size 2 x 4 ranks" in str(caught.value)
