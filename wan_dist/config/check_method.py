"""What contradicts `method.kind`, or what it cannot be combined with."""

import re
from collections.abc import Mapping
from typing import Any

from wan_dist.config.schema import MethodConfig
from wan_dist.config.yaml_text import Problem

_KEYS_OF = {
    "full": (),
    "lora": ("rank", "alpha", "dropout", "targets", "rslora", "dora", "init_from"),
    "embedding": ("token", "num_vectors", "init_text"),
}


def method_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return the keys of another method, bad expressions, and caches that a method cannot use.

    Args:
        values: dotted key to value, well-typed.
    """
    kind = values.get("method.kind", "full")
    problems = []
    for owner, keys in _KEYS_OF.items():
        for key in keys:
            default = MethodConfig.model_fields[key].get_default(call_default_factory=True)
            if owner != kind and values.get(f"method.{key}", default) != default:
                text = f"method.{key} is for method.kind = {owner}, found {kind}; remove it, or change the kind."
                problems.append(Problem(("method", key), text))
    targets = values.get("method.targets")
    for index, pattern in enumerate(targets if isinstance(targets, list) else ()):
        try:
            re.compile(pattern)
        except re.error as error:
            text = f"method.targets[{index}] = {pattern!r} is no regular expression ({error}); mend it."
            problems.append(Problem(("method", "targets", index), text))
    if kind == "embedding" and values.get("data.text_embeds", "auto") not in ("auto", "none"):
        text = "data.text_embeds: an embedding is trained through the text encoder; use none."
        problems.append(Problem(("data", "text_embeds"), text))
    return problems + _base_problems(kind, values)


def _base_problems(kind: str, values: Mapping[str, Any]) -> list[Problem]:
    """Return why the frozen weights cannot be stored in fewer bits."""
    stored = values.get("model.base_dtype")
    if stored is None:
        return []
    where, stage = f"model.base_dtype = {stored}", values.get("parallel.zero_stage", 3)
    found = []
    if kind == "full":
        found.append("method.kind = full has no frozen weights; remove it, or train a lora or an embedding")
    if values.get("method.dora"):
        found.append("method.dora reads the weights that it leaves out; remove one of the two")
    if stage == 3:
        found.append(
            "weights of fewer bits are not partitioned; set parallel.zero_stage to 2 (fp32: 0 to 2), or remove it"
        )
    if values.get("train.compile"):
        found.append("blocks of such weights are not compiled; set train.compile to false, or remove it")
    return [Problem(("model", "base_dtype"), f"{where}: {text}.") for text in found]
