"""What a configuration says about the loss and about given first frames."""

from typing import Any

from wan_dist.config.schema import TrainConfig
from wan_dist.core.losses import weighting
from wan_dist.models.wan.variants import WanVariant
from wan_dist.parallel.dist import ranks_from_environment
from wan_dist.train.prior import base_prediction


def has_prior(cfg: TrainConfig) -> bool:
    """Return whether some data set keeps the model as it was."""
    return not isinstance(cfg.data.shards, str) and any(dataset.kind == "prior" for dataset in cfg.data.shards)


def objective_options(cfg: TrainConfig, variant: WanVariant) -> dict[str, Any]:
    """Return the keyword arguments of `Objective` beside its sampler, dtype and seed."""
    shift = cfg.flow.shift if isinstance(cfg.flow.shift, float) else variant.flow_shift
    return {
        "kind": cfg.flow.loss,
        "huber_delta": cfg.flow.huber_delta,
        "weighting": None if cfg.flow.weighting == "none" else weighting(cfg.flow.weighting, shift),
        "i2v_probability": cfg.data.i2v_probability,
        "first_frame_noise": cfg.data.first_frame_noise,
        "mask_min_weight": cfg.flow.mask_min_weight,
        "base_prediction": base_prediction(ranks_from_environment()) if has_prior(cfg) else None,
    }
