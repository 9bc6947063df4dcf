"""Which optimizer works with which partitioning; the others would silently be something else."""

from collections.abc import Mapping
from typing import Any

from wan_dist.config.yaml_text import Problem


def optim_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what contradicts another key of the section, or the partitioning.

    Args:
        values: dotted key to value, well-typed; a check whose keys are not all there is left out.
    """
    problems = [
        Problem(("optim", "betas", index), f"optim.betas[{index}] = {beta} is not in [0, 1); use for example 0.9.")
        for index, beta in enumerate(values.get("optim.betas", ()))
        if not 0 <= beta < 1
    ]
    problems += _schedule_problems(values)
    if "optim.name" in values:
        problems += _combination_problems(values)
    return problems


def _schedule_problems(values: Mapping[str, Any]) -> list[Problem]:
    schedule = values.get("optim.schedule")
    if schedule is None:
        return []
    used_by = {"num_cycles": ("cosine_restarts", 1), "decay_share": ("wsd", 0.1)}
    return [
        Problem(
            ("optim", key),
            f"optim.{key} = {values[f'optim.{key}']}: optim.schedule = {schedule} does not read it; "
            f"remove it, or use {reader}.",
        )
        for key, (reader, default) in used_by.items()
        if schedule != reader and values.get(f"optim.{key}", default) != default
    ]


def _combination_problems(values: Mapping[str, Any]) -> list[Problem]:
    name, stage = values["optim.name"], values.get("parallel.zero_stage", 3)
    found: list[tuple[str, str]] = []
    if name == "adafactor" and stage != 0:
        text = (
            f"ZeRO stage {stage} cuts weights into flat pieces, of which it cannot factor rows and columns; use "
            "parallel.zero_stage: 0, or adamw_8bit or lion, which need little memory too."
        )
        found.append(("name", text))
    if name == "muon" and stage not in (0, 3):
        found.append(("name", f"is not proved for ZeRO stage {stage}; use parallel.zero_stage: 3 or 0, or adamw."))
    if name == "muon" and stage == 3 and values.get("optim.max_grad_norm", 0.0) > 0:
        text = (
            f"optim.max_grad_norm = {values['optim.max_grad_norm']} would clip the update after it was made "
            "orthogonal, and so only scale optim.lr; use 0."
        )
        found.append(("max_grad_norm", text))
    if name in ("prodigy", "schedule_free") and values.get("optim.decay", "all") != "all":
        text = (
            f"optim.decay = {values['optim.decay']}: it keeps one count for all weights, which ZeRO would advance "
            "once per group; use all."
        )
        found.append(("decay", text))
    if name == "schedule_free" and values.get("optim.schedule", "constant") != "constant":
        schedule = values["optim.schedule"]
        found.append(("schedule", f"optim.schedule = {schedule}: averaging takes a schedule's place; use constant."))
    return [Problem(("optim", key), f"optim.name = {name}: {text}") for key, text in found]
