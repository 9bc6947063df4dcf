"""What makes a well-typed config wrong all the same: the variant's constants, and what is on the disk."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_dist.config.check_conditions import condition_problems, prior_problems
from wan_dist.config.check_flow import flow_problems
from wan_dist.config.check_method import method_problems
from wan_dist.config.check_optim import optim_problems
from wan_dist.config.check_watching import watching_problems
from wan_dist.config.schema import TrainConfig
from wan_dist.config.yaml_text import Problem
from wan_dist.core.buckets import FIXED_RULES
from wan_dist.core.errors import ConfigError, DataError, ModelError, WanDistError, before_first_step
from wan_dist.data.stores import is_remote
from wan_dist.models.wan.variants import WanVariant, get_variant
from wan_dist.parallel.ds_config import deepspeed_config


def semantic_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what contradicts the variant or another key.

    Args:
        values: dotted key to value, well-typed; a check whose keys are not all there is left out.
    """
    problems = optim_problems(values) + _deepspeed_problems(values) + _stream_problems(values) + flow_problems(values)
    problems += method_problems(values) + _stage_problems(values) + prior_problems(values)
    problems += watching_problems(values)
    if "model.variant" in values:
        variant = get_variant(values["model.variant"])
        problems += _expert_problems(variant, values)
        problems += _sequence_problems(variant, values)
        problems += _size_problems(variant, values.get("data.sizes", []))
        problems += condition_problems(variant, values)
    return problems + _frame_problems(values.get("data.num_frames", [])) + _cache_problems(values)


@before_first_step()
def check_paths(cfg: TrainConfig) -> None:
    """Return if the model folder and the shards that a config names are there and the run folder can be written.

    Relative paths are relative to the current folder, wherever the config file lies.

    Args:
        cfg: a loaded configuration.
    Raises:
        ConfigError: `run_dir` cannot be made or written to.
        ModelError: `model.path` is not a diffusers folder.
        DataError: `data.shards` is not a folder of packed shards.
    """
    found: list[WanDistError] = []
    model_path = Path(cfg.model.path)
    if text := _folder_problem(model_path, "model_index.json"):
        advice = "give the diffusers folder of the pipeline"
        found.append(ModelError(f"model.path = {cfg.model.path}: {text}; {advice}."))
    for key, path in _shard_folders(cfg):
        if text := _shards_problem(path, cfg.data.source):
            found.append(DataError(f"{key} = {path}: {text}."))
    for key in ("latents", "text_embeds"):
        path = getattr(cfg.data, key)
        if path not in ("auto", "none") and (text := _folder_problem(Path(path), "manifest.json")):
            advice = "write it with `wan-data cache`, or use auto or none"
            found.append(DataError(f"data.{key} = {path}: {text}; {advice}."))
    if text := _output_problem(Path(cfg.run_dir)):
        found.append(ConfigError(f"run_dir = {cfg.run_dir}: {text}; choose another."))
    if found:
        raise type(found[0])("\n".join(str(error) for error in found))


def _output_problem(folder: Path) -> str | None:
    """Return why nothing can be written into a folder that may not exist yet."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written to"


def _shard_folders(cfg: TrainConfig) -> list[tuple[str, str]]:
    """Return the key and the path of every data set on this machine."""
    found: list[tuple[str, str]] = []
    for key, value in (("data.shards", cfg.data.shards), ("data.validation", cfg.data.validation)):
        if isinstance(value, str):
            found.append((key, value))
        else:
            found += [(f"{key}[{number}].path", dataset.path) for number, dataset in enumerate(value or [])]
    return [(key, path) for key, path in found if not is_remote(path)]


def _shards_problem(path: str, source: str) -> str | None:
    if source == "stream":
        return None  # its tars are named one by one, and looked at when the stream is opened
    text = _folder_problem(Path(path), "manifest.json")
    return f"{text}; write it with `wan-data pack CLIPS {path}`" if text else None


def _folder_problem(folder: Path, marker: str) -> str | None:
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "there is no such folder"
        return what if folder.is_absolute() else f"{what} under {Path.cwd()}"
    return None if (folder / marker).is_file() else f"the folder holds no {marker}"


def _stream_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return the keys that a stream would ignore."""
    if values.get("data.source") != "stream":
        return []
    if values.get("model.expert") == "both" and values.get("flow.shift") == "resolution":
        text = "flow.shift = resolution: with data.source = stream and both experts the ranks' shapes differ; use auto."
        return [Problem(("flow", "shift"), text)]
    unset = {"data.tail": "carry", "data.validation": None, "data.cache_dir": None}
    problems = [
        Problem(tuple(key.split(".")), f"{key} = {values[key]}: data.source = stream cannot do this; remove it.")
        for key, default in unset.items()
        if values.get(key, default) != default
    ]
    if not isinstance(values.get("data.shards", ""), str):
        text = "data.shards is a list: data.source = stream reads one name; use braces such as data-{000..099}.tar."
        problems.append(Problem(("data", "shards"), text))
    return problems


def _deepspeed_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return the further DeepSpeed key that collides with one of ours; the numbers here decide nothing."""
    try:
        deepspeed_config(
            micro_batch_size=1,
            accumulation_steps=1,
            world_size=1,
            dtype=values.get("model.dtype", "bf16"),
            max_grad_norm=values.get("optim.max_grad_norm", 1.0),
            zero_stage=values.get("parallel.zero_stage", 3),
            offload_optimizer=values.get("parallel.offload_optimizer", "none"),
            offload_param=values.get("parallel.offload_param", "none"),
            pin_memory=False,
            extra=values.get("parallel.deepspeed", {}),
        )
    except ConfigError as error:
        return [Problem(("parallel", "deepspeed"), str(error))]
    return []


def _stage_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return what a ZeRO stage cannot do."""
    stage = values.get("parallel.zero_stage", 3)
    if values.get("train.offload_hidden_states") and values.get("train.gradient_checkpointing") == "none":
        text = "train.offload_hidden_states: train.gradient_checkpointing = none keeps no such inputs; use block."
        return [Problem(("train", "offload_hidden_states"), text)]
    if stage == 0 and values.get("model.dtype", "bf16") == "bf16":
        text = "parallel.zero_stage = 0: DeepSpeed has no fp32 masters for bf16 weights there; use 1 to 3, or fp32."
        return [Problem(("parallel", "zero_stage"), text)]
    needed = {"offload_param": 3, "offload_optimizer": 1}
    return [
        Problem(
            ("parallel", key),
            f"parallel.{key} = cpu: needs parallel.zero_stage = {least} or higher, found {stage}; use none.",
        )
        for key, least in needed.items()
        if values.get(f"parallel.{key}", "none") == "cpu" and stage < least
    ]


def _sequence_problems(variant: WanVariant, values: Mapping[str, Any]) -> list[Problem]:
    """Return the buckets whose tokens a group of ranks cannot share evenly."""
    size = values.get("parallel.sequence_parallel", 1)
    for width, height in values.get("data.sizes", []):
        for frames in values.get("data.num_frames", []):
            tokens = variant.num_tokens(frames, width, height)
            if tokens % size:
                text = (
                    f"parallel.sequence_parallel = {size} does not divide the {tokens} tokens of {width}x{height} with "
                    f"{frames} frames; use another size, or another number of ranks per sample."
                )
                return [Problem(("parallel", "sequence_parallel"), text)]
    return []


def _expert_problems(variant: WanVariant, values: Mapping[str, Any]) -> list[Problem]:
    if "model.expert" not in values:
        return []
    expert, path = values["model.expert"], ("model", "expert")
    trained = variant.experts if expert in (None, "both") else (expert,)
    unused = [
        Problem((section, key, name), f"{section}.{key}.{name}: this job does not train {name}; remove it.")
        for section, key in (("optim", "expert_lr"), ("method", "init_from"))
        for name in values.get(f"{section}.{key}", {})
        if name not in trained
    ]
    return unused + _one_expert_problems(variant, expert, path)


def _one_expert_problems(variant: WanVariant, expert: str | None, path: tuple[str, str]) -> list[Problem]:
    if variant.num_transformers == 1:
        if expert is None:
            return []
        return [
            Problem(path, f"model.expert = {expert}: {variant.name} has one transformer; remove the key or use null.")
        ]
    if expert in (*variant.experts, "both"):
        return []
    text = f"model.expert = null: {variant.name} has two experts; use {' or '.join(variant.experts)}, or both."
    return [Problem(path, text)]


def _size_problems(variant: WanVariant, sizes: list[Any]) -> list[Problem]:
    problems = []
    multiple = variant.pixel_multiple
    for index, (width, height) in enumerate(sizes):
        for name, pixels in (("width", width), ("height", height)):
            if pixels >= multiple and pixels % multiple == 0:
                continue
            below = pixels // multiple * multiple
            allowed = f"{below} or {below + multiple}" if below > 0 else f"{multiple} or more"
            text = f"data.sizes = {width}x{height}: {name} is not a multiple of {multiple}; use {allowed}."
            problems.append(Problem(("data", "sizes", index), text))
        if list(map(tuple, sizes)).index((width, height)) < index:
            text = f"data.sizes = {width}x{height} is listed twice; keep one."
            problems.append(Problem(("data", "sizes", index), text))
    return problems


def _cache_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Return why a named cache cannot serve; `auto` then encodes online."""
    problems: list[Problem] = []
    for key in ("latents", "text_embeds"):
        path = values.get(f"data.{key}", "auto")
        if path in ("auto", "none"):
            continue
        named = f"data.{key} = {path}"
        if values.get("data.source") == "stream":
            problems.append(Problem(("data", key), f"{named}: data.source: stream reads no caches; use none."))
        if isinstance(values.get("data.shards"), list):
            text = f"{named}: one folder cannot serve several data sets; use auto, which looks beside each of them."
            problems.append(Problem(("data", key), text))
        for rule in ("frame_choice", "crop"):
            value = values.get(f"data.{rule}", FIXED_RULES[0])
            if key == "latents" and value not in FIXED_RULES:
                text = (
                    f"{named}: data.{rule} = {value} shows other pixels on every visit; use {' or '.join(FIXED_RULES)}."
                )
                problems.append(Problem(("data", key), text))
    return problems


def _frame_problems(counts: list[int]) -> list[Problem]:
    problems = []
    for index, count in enumerate(counts):
        path = ("data", "num_frames", index)
        if count < 1 or count % 4 != 1:
            below = max((count - 1) // 4 * 4 + 1, 1)
            text = f"data.num_frames = {count} is not 4n+1; use {below} or {below + 4}."
            problems.append(Problem(path, text))
        elif counts.index(count) < index:
            problems.append(Problem(path, f"data.num_frames = {count} is listed twice; keep one."))
    return problems
