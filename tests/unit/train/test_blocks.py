import pytest
import torch

from wan_dist.core.errors import ConfigError
from wan_dist.models.wan.build import build_transformer
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import get_variant
from wan_dist.train.blocks import choose_attention

CPU = torch.device("cpu")


def test_a_refused_attention_kernel_is_not_left_behind() -> None:
    """diffusers keeps the last choice for every model of the process."""
    refused, other = (build_transformer(get_variant("t2v-A14B")) for _ in range(2))
    with pytest.raises(ConfigError, match=r"train\.attention = cudnn: does not run on cpu .*; use auto"):
        choose_attention(refused, "cudnn", torch.float32, CPU)
    latents, text = torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 512, 64)
    assert predict_velocity(other, latents, torch.ones(1), text, None).shape == latents.shape
