"""Combinations of methods and memory options that cannot be: refused at load, with the mend."""

import pytest

from wan_dist.config.load import load_config
from wan_dist.config.resources import configs_dir
from wan_dist.core.errors import ConfigError

CONFIG = configs_dir() / "train" / "ti2v-5b-lora.yaml"
FP8 = ["model.base_dtype=fp8", "parallel.zero_stage=2", "parallel.offload_param=none"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.base_dtype=fp8"], "weights of fewer bits are not partitioned; set parallel.zero_stage to 2"),
        ([*FP8, "method.dora=true"], "method.dora reads the weights that it leaves out"),
        ([*FP8, "train.compile=true"], "set train.compile to false"),
        ([*FP8, "method={kind: full}"], "method.kind = full has no frozen weights; remove it"),
        ([*FP8, "parallel.offload_param=cpu"], "needs parallel.zero_stage = 3"),
        (["model.base_dtype=int8"], "model.base_dtype"),
    ],
)
def test_a_base_of_fewer_bits_that_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, overrides)


def test_a_base_of_fewer_bits_loads() -> None:
    assert load_config(CONFIG, FP8).model.base_dtype == "fp8"
