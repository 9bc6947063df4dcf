"""Given frames that a variant does not take are refused with the key and the mend."""

from typing import Any

import pytest

from wan_dist.config.check_conditions import condition_problems, prior_problems
from wan_dist.models.wan.variants import get_variant


@pytest.mark.parametrize(
    ("variant", "values", "key", "text"),
    [
        ("t2v-A14B", {"data.i2v_probability": 0.5}, "data.i2v_probability", "takes no image; remove"),
        ("i2v-A14B", {"data.i2v_probability": 0.5}, "data.i2v_probability", "is always image-to-video; remove"),
        ("ti2v-5B", {"data.flf2v_probability": 0.5}, "data.flf2v_probability", "only i2v-A14B does; remove"),
        ("ti2v-5B", {"data.first_frame_noise": True}, "data.first_frame_noise", "set data.i2v_probability"),
        ("i2v-A14B", {"data.num_frames": [5, 1]}, "data.num_frames.1", "use 5 or more, which leaves images out"),
        ("ti2v-5B", {"data.i2v_probability": 0.2, "data.num_frames": [1]}, "data.i2v_probability", "add 5 or more"),
    ],
)
def test_what_a_variant_cannot_do_is_named(variant: str, values: dict[str, Any], key: str, text: str) -> None:
    (problem,) = condition_problems(get_variant(variant), values)
    assert ".".join(map(str, problem.path)) == key
    assert text in problem.text


@pytest.mark.parametrize(
    ("variant", "values"),
    [
        ("ti2v-5B", {"data.i2v_probability": 0.2, "data.first_frame_noise": True, "data.num_frames": [1, 5]}),
        ("i2v-A14B", {"data.flf2v_probability": 1.0, "data.num_frames": [5]}),
        ("t2v-A14B", {"data.num_frames": [1]}),
    ],
)
def test_what_it_can_is_not(variant: str, values: dict[str, Any]) -> None:
    assert condition_problems(get_variant(variant), values) == []


def test_a_prior_needs_adapters_to_switch_off() -> None:
    shards = [{"path": "a"}, {"path": "b", "kind": "prior"}]
    (problem,) = prior_problems({"method.kind": "full", "data.shards": shards})
    assert problem.path == ("data", "shards", 1, "kind")
    assert "use method.kind: lora, or train on clips that the model made" in problem.text
    assert prior_problems({"method.kind": "lora", "data.shards": shards}) == []
    assert prior_problems({"data.shards": "a"}) == prior_problems({"data.shards": shards[:1]}) == []
