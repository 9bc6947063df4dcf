"""Which given frames a variant can be trained on and with which clips, and which methods can preserve a prior."""

from collections.abc import Mapping
from typing import Any

from wan_dist.config.yaml_text import Problem
from wan_dist.models.wan.variants import WanVariant


def condition_problems(variant: WanVariant, values: Mapping[str, Any]) -> list[Problem]:
    """Return the keys about given frames that contradict the variant or the number of frames.

    Args:
        variant: what is trained.
        values: dotted key to value, well-typed.
    """
    problems: list[Problem] = []
    image_or_text = variant.per_token_timestep and variant.takes_image
    i2v, flf2v = values.get("data.i2v_probability", 0.0), values.get("data.flf2v_probability", 0.0)
    if i2v > 0 and not image_or_text:
        what = "is always image-to-video" if variant.needs_condition else "takes no image"
        problems.append(_problem("i2v_probability", i2v, f"{variant.name} {what}; remove the key."))
    if flf2v > 0 and not variant.needs_condition:
        text = f"{variant.name} takes no last frame, only i2v-A14B does; remove the key."
        problems.append(_problem("flf2v_probability", flf2v, text))
    if values.get("data.first_frame_noise") and not i2v:
        text = "no first frame is given; set data.i2v_probability of ti2v-5B, or remove the key."
        problems.append(_problem("first_frame_noise", "true", text))
    counts = values.get("data.num_frames", [])
    if variant.needs_condition and 1 in counts:
        text = (
            f"data.num_frames = 1: {variant.name} is given the first frame, so that nothing of an image is left to "
            "predict; use 5 or more, which leaves images out."
        )
        problems.append(Problem(("data", "num_frames", list(counts).index(1)), text))
    if i2v > 0 and image_or_text and counts and max(counts) == 1:
        text = "images of one frame are trained as text-to-video; add 5 or more to data.num_frames, or remove the key."
        problems.append(_problem("i2v_probability", i2v, text))
    return problems


def prior_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return the data sets of `kind: prior` of a run that has no frozen base beside what it trains.

    Args:
        values: dotted key to value, well-typed.
    """
    method, shards = values.get("method.kind", "full"), values.get("data.shards", "")
    problems: list[Problem] = []
    for number, dataset in enumerate(shards if isinstance(shards, list) else []):
        kind = dataset.get("kind") if isinstance(dataset, Mapping) else dataset.kind
        if kind == "prior" and method != "lora":
            text = (
                f"data.shards[{number}].kind = prior: its target is the model without adapters, and method.kind = "
                f"{method} has none; use method.kind: lora, or train on clips that the model made (kind: train)."
            )
            problems.append(Problem(("data", "shards", number, "kind"), text))
    return problems


def _problem(key: str, value: Any, text: str) -> Problem:
    return Problem(("data", key), f"data.{key} = {value}: {text}")
