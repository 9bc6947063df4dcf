"""Prior preservation: what the frozen base model predicts is the target for clips of data sets of `kind: prior`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from wan_dist.models.wan.forward import predict_velocity
from wan_dist.parallel import dist
from wan_dist.parallel.dist import Ranks
from wan_dist.train.objective import BasePrediction, Inputs


def base_prediction(ranks: Ranks) -> BasePrediction:
    """Return what a transformer with adapters predicts without them: the base model, held once."""

    def predict(transformer: Any, inputs: Inputs, *, wanted: bool) -> Tensor | None:
        # All ranks or none: a forward gathers partitioned weights.
        if not dist.any_rank(wanted, ranks):
            return None
        with torch.no_grad(), adapters_off(transformer):
            return predict_velocity(transformer, *inputs)

    return predict


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Let a model with peft adapters compute without them.

    peft's own switch also takes the adapters' `requires_grad` away and gives it back, under the hooks that DeepSpeed
    has put on their gradients; only what the layers' forward looks at is set here.

    Args:
        model: the model, or an engine around it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds to import, and not needed in every run

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers, "a model without adapters is its own base"
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
