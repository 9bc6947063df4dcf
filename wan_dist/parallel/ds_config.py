"""The DeepSpeed configuration, generated from plain values: one value has one owner."""

from collections.abc import Mapping
from typing import Any, Literal

from wan_dist.core.errors import ConfigError

Device = Literal["none", "cpu"]


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the forward passes per optimizer step on each rank.

    Raises:
        ConfigError: the global batch does not divide by ranks times micro-batch.
    """
    if global_batch_size % (micro_batch_size * world_size):
        micro_batches = global_batch_size // micro_batch_size
        legal = [str(n) for n in range(1, micro_batches + 1) if global_batch_size % (micro_batch_size * n) == 0]
        raise ConfigError(
            f"train.global_batch_size = {global_batch_size} does not divide by micro_batch_size {micro_batch_size} x "
            f"{world_size} ranks; use {' or '.join(legal)} ranks, or a multiple of {micro_batch_size * world_size}."
        )
    return global_batch_size // (micro_batch_size * world_size)


def deepspeed_config(
    *,
    micro_batch_size: int,
    world_size: int,
    dtype: Literal["bf16", "fp32"],
    max_grad_norm: float,
    zero_stage: int,
    accumulation_steps: int = 1,
    offload_optimizer: Device = "none",
    offload_param: Device = "none",
    pin_memory: bool = False,
    extra: Mapping[str, Any] | None = None,
    zero_keys: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    Args:
        micro_batch_size: clips per forward pass on one rank.
        world_size: number of ranks.
        dtype: compute dtype; masters, gradient accumulation and optimizer states are fp32 in both.
        max_grad_norm: global gradient norm limit, 0 for none.
        zero_stage: what is partitioned over the ranks, 0 to 3.
        accumulation_steps: forward passes per optimizer step.
        offload_optimizer: where optimizer states live.
        offload_param: where partitioned weights live.
        pin_memory: page-lock offloaded memory (an accelerator is used).
        extra: further DeepSpeed keys, merged in.
        zero_keys: `zero_optimization` keys that the optimizer needs.

    Raises:
        ConfigError: `extra` sets a key that is set here.
    """
    # The defaults keep two 1 GB buffers alive, which a 24 GB card has no room for (docs/design.md).
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_bucket_size": 100_000_000}
    if zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = 50_000_000
    if offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if offload_param == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    zero |= zero_keys or {}
    config: dict[str, Any] = {
        "train_batch_size": micro_batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 10**9,
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    _merge(config, extra or {}, "parallel.deepspeed")
    return config


def check_settings(config: Mapping[str, Any]) -> None:
    """Return if DeepSpeed knows the sections of a configuration; the ranks must be connected.

    A key of `zero_optimization` that stands beside it would be ignored without a word.

    Raises:
        ConfigError: a key is misplaced, unknown or has a value that DeepSpeed does not take.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for key in sorted(config.keys() & DeepSpeedZeroConfig.model_fields.keys()):
        raise ConfigError(
            f"parallel.deepspeed.{key}: DeepSpeed reads it in zero_optimization; write "
            f"parallel.deepspeed: {{zero_optimization: {{{key}: {config[key]}}}}}."
        )
    try:
        DeepSpeedConfig(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"parallel.deepspeed: DeepSpeed refuses {where} ({first['msg']}); correct it.") from None


def _merge(config: dict[str, Any], extra: Mapping[str, Any], where: str) -> None:
    for key, value in extra.items():
        here = f"{where}.{key}"
        mine = config.get(key)
        if isinstance(mine, dict) and isinstance(value, Mapping):
            _merge(mine, value, here)
        elif key in config:
            raise ConfigError(f"{here} = {value!r} collides with the value wan_dist sets ({mine!r}); remove it.")
        else:
            config[key] = dict(value) if isinstance(value, Mapping) else value
