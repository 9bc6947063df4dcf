"""Which samples are given their last frame: as often as asked, never of images, whatever happens to their captions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan_dist.core.buckets import Bucket
from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.core.rng import uniform
from wan_dist.data.sample_encoder import SampleEncoder
from wan_dist.train.objective import Objective

VIDEO, IMAGE = Bucket(64, 64, 9), Bucket(64, 64, 1)
COUNT = 10_000
SHARES = {"second of three captions": 1 / 3}


def encoder(probability: float, with_condition: bool = True) -> SampleEncoder:
    encoders: Any = None
    return SampleEncoder(encoders, with_condition=with_condition, flf2v_probability=probability, seed=7, cache_bytes=0)


def test_images_and_other_variants_have_no_last_frame() -> None:
    assert not any(encoder(1.0).draw_last(IMAGE, 0, position) for position in range(100))
    assert not any(encoder(1.0, with_condition=False).draw_last(VIDEO, 0, position) for position in range(100))
    assert all(encoder(1.0).draw_last(VIDEO, 0, position) for position in range(100))
    assert encoder(1.0).parts(with_last=True) == ("latents", "condition_last")
    assert encoder(1.0).parts(with_last=False) == ("latents", "condition")
    assert encoder(1.0, with_condition=False).parts(with_last=False) == ("latents",)


def test_given_frames_captions_and_dropout_are_drawn_independently() -> None:
    positions = range(COUNT)
    objective = Objective(SigmaSampler(shift=5.0), torch.float32, 7, i2v_probability=0.3)
    batch: Any = SimpleNamespace(latents=torch.zeros(1, 1, 3, 1, 1), positions=positions, bucket=0)
    draws = {
        "i2v": torch.tensor(objective.draw_first_given(batch)),
        "flf2v": torch.tensor([encoder(0.3).draw_last(VIDEO, 0, position) for position in positions]),
        "caption_dropout": torch.tensor([uniform(7, "caption_dropout", 0, position) < 0.3 for position in positions]),
        "second of three captions": torch.tensor([int(uniform(7, "caption", 0, p) * 3) == 1 for p in positions]),
        "high noise": torch.tensor([uniform(7, "sigma", 0, position) > 0.7 for position in positions]),
    }
    names = list(draws)
    for place, name in enumerate(names):
        # Standard error of a share of 0.3 among 10 000: 0.0046.
        assert float(draws[name].double().mean()) == pytest.approx(SHARES.get(name, 0.3), abs=0.02)
        for other in names[:place]:
            together = float((draws[name] & draws[other]).double().mean())
            alone = float(draws[name].double().mean() * draws[other].double().mean())
            assert together == pytest.approx(alone, abs=0.015), (name, other)
