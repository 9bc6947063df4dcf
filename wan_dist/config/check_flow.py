"""What makes a well-typed `flow` section wrong: ranges without noise levels, rules without points."""

from collections.abc import Mapping
from typing import Any

from wan_dist.config.yaml_text import Problem
from wan_dist.models.wan.variants import VARIANTS, WanVariant

# Which sampling reads a key: elsewhere it would be ignored.
_USED_BY = {
    "logit_mean": ("logit_normal", 0.0),
    "logit_std": ("logit_normal", 1.0),
    "sigmoid_scale": ("sigmoid", 1.0),
    "mode_scale": ("mode", 1.29),
    "beta_alpha": ("beta", 0.6),
    "beta_beta": ("beta", 0.6),
}


def flow_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what contradicts the variant or another key of the section.

    Args:
        values: dotted key to value, well-typed; a check whose keys are not all there is left out.
    """
    problems = _unread_keys(values) + _mode_problems(values)
    return problems + _range_problems(values) + _shift_problems(values)


def _mode_problems(values: Mapping[str, Any]) -> list[Problem]:
    if values.get("flow.sampling") != "mode" or "flow.mode_scale" not in values:
        return []
    from wan_dist.core.unit_distributions import MAX_MODE_SCALE  # here: importing torch takes seconds

    scale = values["flow.mode_scale"]
    if -1.0 <= scale <= MAX_MODE_SCALE:
        return []
    text = f"flow.mode_scale = {scale} is not in [-1, {MAX_MODE_SCALE:.4f}]; use for example 1.29."
    return [Problem(("flow", "mode_scale"), text)]


def _unread_keys(values: Mapping[str, Any]) -> list[Problem]:
    sampling = values.get("flow.sampling")
    if sampling is None:
        return []
    return [
        Problem(
            ("flow", key),
            f"flow.{key} = {values[f'flow.{key}']}: flow.sampling = {sampling} does not read it; remove it, or use "
            f"flow.sampling: {reader}.",
        )
        for key, (reader, default) in _USED_BY.items()
        if reader != sampling and values.get(f"flow.{key}", default) != default
    ]


def _range_problems(values: Mapping[str, Any]) -> list[Problem]:
    if "flow.t_min" not in values or "flow.t_max" not in values:
        return []
    low, high = values["flow.t_min"], values["flow.t_max"]
    path = ("flow", "t_min")
    if low >= high:
        return [Problem(path, f"flow.t_min = {low} is not below flow.t_max = {high}; use for example 0.0 and 1.0.")]
    variant = VARIANTS.get(values.get("model.variant", ""))
    if variant is None or variant.boundary is None:
        return []
    expert, boundary = values.get("model.expert"), variant.boundary
    missing = []
    if expert in ("high_noise", "both") and high <= boundary:
        missing.append(("high_noise", f"flow.t_max above {boundary}", "low_noise"))
    if expert in ("low_noise", "both") and low >= boundary:
        missing.append(("low_noise", f"flow.t_min below {boundary}", "high_noise"))
    return [
        Problem(
            path,
            f"flow.t_min = {low}, flow.t_max = {high}: leave no noise level to {variant.name}'s {name} expert "
            f"(boundary {boundary}); use {mend}, or model.expert: {other}.",
        )
        for name, mend, other in missing
    ]


def _shift_problems(values: Mapping[str, Any]) -> list[Problem]:
    shift, rule, points = (values.get(f"flow.{key}") for key in ("shift", "shift_rule", "shift_points"))
    path = ("flow", "shift_points")
    if shift != "resolution":
        if "flow.shift" in values and (points or rule not in ("sqrt", None)):
            key, value = ("shift_points", points) if points else ("shift_rule", rule)
            text = f"flow.{key} = {value}: only flow.shift: resolution reads it, flow.shift is {shift}; remove one."
            return [Problem(("flow", key), text)]
        return []
    if rule is None:
        return []
    if rule != "sqrt" and not points:
        text = f"flow.shift_points is missing: shift_rule {rule} goes through two [tokens, shift] pairs; set them."
        return [Problem(path, text)]
    if not points:
        return []
    from wan_dist.core.flow_matching import ResolutionShift  # here: it imports torch, and --help must not

    try:
        resolution = ResolutionShift(rule, tuple((int(tokens), float(value)) for tokens, value in points))
        for num_tokens in _tokens_of_buckets(values):
            resolution.at(num_tokens)
    except ValueError as error:
        return [Problem(path, f"flow.shift_points = {points}: {error}; give pairs such as [[1560, 3], [75600, 12]].")]
    return []


def _tokens_of_buckets(values: Mapping[str, Any]) -> list[int]:
    variant: WanVariant | None = VARIANTS.get(values.get("model.variant", ""))
    if variant is None:
        return []
    return [
        variant.num_tokens(frames, width, height)
        for width, height in values.get("data.sizes", [])
        for frames in values.get("data.num_frames", [])
    ]
