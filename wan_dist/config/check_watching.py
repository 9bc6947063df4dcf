"""What of samples and averages a run cannot do."""

from collections.abc import Mapping
from typing import Any

from wan_dist.config.yaml_text import Problem
from wan_dist.models.wan.variants import VARIANTS


def watching_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what contradicts the variant or another key.

    Args:
        values: dotted key to value, well-typed; a check whose keys are not all there is left out.
    """
    problems = _average_problems(values)
    if values.get("samples.every", 0):
        problems += _sample_problems(values)
    return problems


def _average_problems(values: Mapping[str, Any]) -> list[Problem]:
    decay, path = values.get("train.ema_decay", 0.0), ("train", "ema_decay")
    if not decay:
        return []
    if values.get("parallel.zero_stage", 3) == 0:
        text = f"train.ema_decay = {decay}: averages are kept on shards; use parallel.zero_stage: 1, 2 or 3."
        return [Problem(path, text)]
    if values.get("optim.name") == "schedule_free":
        text = f"train.ema_decay = {decay}: optim.name = schedule_free keeps its own average; remove the key."
        return [Problem(path, text)]
    return []


def _sample_problems(values: Mapping[str, Any]) -> list[Problem]:
    found: list[tuple[str, str]] = []
    prompts, images = values.get("samples.prompts", []), values.get("samples.images", [])
    if not prompts and not values.get("samples.prompts_file"):
        found.append(("prompts", "samples.prompts is empty: list what to draw, or name a samples.prompts_file."))
    if values.get("method.kind") == "embedding":
        found.append(("every", "samples.every: an embedding run draws no samples; use 0, and sample its export."))
    variant = VARIANTS.get(values.get("model.variant", ""))
    if variant is not None:
        if variant.num_transformers > 1 and values.get("model.expert") not in (None, "both"):
            text = "samples.every: drawing takes both experts, and this run holds one; use model.expert: both, or 0."
            found.append(("every", text))
        if variant.needs_condition and not images:
            found.append(("images", f"samples.images is empty: {variant.name} draws from first frames; give them."))
        if images and not variant.takes_image:
            found.append(("images", f"samples.images: {variant.name} takes no first frame; remove the key."))
        found += _shape_problems(values, variant.pixel_multiple)
    if images and not values.get("samples.prompts_file") and len(images) != len(prompts):
        text = f"samples.images has {len(images)} files for {len(prompts)} prompts; give one each."
        found.append(("images", text))
    return [Problem(("samples", key), text) for key, text in found]


def _shape_problems(values: Mapping[str, Any], multiple: int) -> list[tuple[str, str]]:
    found = []
    size, num_frames = values.get("samples.size"), values.get("samples.num_frames")
    if size and any(side < multiple or side % multiple for side in size):
        found.append(("size", f"samples.size = {size[0]}x{size[1]}: width and height are multiples of {multiple}."))
    if num_frames is not None and (num_frames < 1 or num_frames % 4 != 1):
        found.append(("num_frames", f"samples.num_frames = {num_frames} is not 4n+1; use for example 81."))
    return found
