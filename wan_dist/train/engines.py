"""DeepSpeed engines around what a run trains: one component of the pipeline each."""

import logging
from pathlib import Path
from typing import Any

import torch

from wan_dist.adapters.frozen_base import quantise_blocks
from wan_dist.adapters.lora import LoraSpec, add_lora, continue_from, target_modules
from wan_dist.adapters.lora_files import check_expert, read_lora
from wan_dist.config.schema import TrainConfig
from wan_dist.core.rng import seed_of
from wan_dist.io.lora_export import with_magnitudes
from wan_dist.io.model_files import open_model
from wan_dist.models.wan.transformer import (
    EXPERT_FOLDERS,
    empty_transformer,
    read_transformer_config,
)
from wan_dist.models.wan.variants import WanVariant
from wan_dist.parallel.dist import Ranks
from wan_dist.parallel.ds_config import check_settings, deepspeed_config
from wan_dist.parallel.environment import build_guard
from wan_dist.parallel.load import build_model, fill, fill_masters, gather_in_blocks, gathered_for_libraries
from wan_dist.parallel.sequence import share_tokens
from wan_dist.train.blocks import Context, checkpoint_blocks, choose_attention, compile_blocks
from wan_dist.train.optimizers import OptimizerOptions, build_optimizer, zero_settings

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def component_of(expert: str) -> str:
    """Return the diffusers folder of an expert, which names its component in checkpoints."""
    return EXPERT_FOLDERS.get(expert, expert)


def deepspeed_settings(cfg: TrainConfig, ranks: Ranks, num_accumulated: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    Raises:
        ConfigError: DeepSpeed does not take a key of it.
    """
    config = deepspeed_config(
        micro_batch_size=cfg.train.micro_batch_size,
        accumulation_steps=num_accumulated,
        world_size=ranks.world_size,
        dtype=cfg.model.dtype,
        max_grad_norm=cfg.optim.max_grad_norm,
        zero_stage=cfg.parallel.zero_stage,
        offload_optimizer=cfg.parallel.offload_optimizer,
        offload_param=cfg.parallel.offload_param,
        pin_memory=ranks.device.type != "cpu",
        extra=cfg.parallel.deepspeed,
        zero_keys=zero_settings(cfg.optim.name),
    )
    check_settings(config)
    return config


def build_engine(
    cfg: TrainConfig, variant: WanVariant, expert: str, ds_config: dict[str, Any], ranks: Ranks
) -> tuple[Any, Context]:
    """Return the DeepSpeed engine around one pretrained transformer, and a context for its forward and backward.

    Under ZeRO-3 the weights are partitioned from the first byte on.

    Args:
        cfg: a loaded configuration.
        variant: its variant.
        expert: which transformer, as `expert_names` names it.
        ds_config: from `deepspeed_settings`.
        ranks: this process's place.
    """
    folder = Path(cfg.model.path) / component_of(expert)
    model = load_transformer(cfg, variant, folder, ds_config)
    if cfg.method.kind == "lora":
        add_adapters(cfg, model, expert, ds_config)
    if cfg.model.base_dtype:
        quantise_blocks(model, cfg.model.base_dtype, ranks.device)
    model.to(ranks.device)  # buffers; the partitions are where DeepSpeed put them
    model.train()
    context = prepare_blocks(cfg, model, ranks)
    engine = initialize(cfg, model, ds_config, ranks, what=str(folder))
    if cfg.method.kind == "full" and cfg.model.dtype == "bf16":
        fill_masters(engine.module, folder)
    return engine, context


def prepare_blocks(cfg: TrainConfig, model: Any, ranks: Ranks) -> Context:
    """Set how a transformer's blocks compute, and return a context for one forward and backward."""
    choose_attention(model, cfg.train.attention, DTYPES[cfg.model.dtype], ranks.device)
    if cfg.train.compile:
        compile_blocks(model)
    if ranks.sequence_size > 1:
        share_tokens(model, ranks)
    return checkpoint_blocks(model, cfg.train.gradient_checkpointing, offload=cfg.train.offload_hidden_states)


def load_transformer(cfg: TrainConfig, variant: WanVariant, folder: Path, ds_config: dict[str, Any]) -> Any:
    """Return a pretrained transformer in the run's dtype, its blocks gathered whole where it is partitioned."""
    config = read_transformer_config(folder, variant)
    model: Any = build_model(lambda: empty_transformer(config), ds_config, DTYPES[cfg.model.dtype])
    fill(model, folder)
    if cfg.parallel.zero_stage == 3:
        gather_in_blocks([model.blocks[0]], model)
        # A block none of whose inputs needs a gradient, as the first one behind frozen weights, would have its gathered
        # weights released before its adapters' gradients are computed (deepspeed 0.19.8).
        model.patch_embedding.register_forward_hook(_with_gradient)
    return model


def _with_gradient(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True) if torch.is_grad_enabled() else output


def initialize(cfg: TrainConfig, model: Any, ds_config: dict[str, Any], ranks: Ranks, *, what: str) -> Any:
    """Return the engine that trains a model's unfrozen parameters; collective."""
    import deepspeed

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    offloaded = cfg.parallel.offload_optimizer == "cpu" and ranks.device.type != "cpu"
    options = OptimizerOptions(
        cfg.optim.lr,
        cfg.optim.betas,
        cfg.optim.eps,
        cfg.optim.weight_decay,
        offloaded,
        zero_stage=cfg.parallel.zero_stage,
        decay=cfg.optim.decay,
        extra=cfg.optim.options,
    )
    # Only an accelerator whose optimizer is offloaded makes DeepSpeed compile something.
    with build_guard(builds=offloaded):
        optimizer = build_optimizer(cfg.optim.name, trainable, options)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=[p for _, p in trainable],  # type: ignore[arg-type]  # its annotation asks for one tensor
        config=ds_config,
    )
    if cfg.parallel.zero_stage in (1, 2):
        optimizer_of: Any = engine.optimizer
        optimizer_of.check_grad_overflow = True  # as ZeRO-3 does: a step of non-finite gradients is skipped
    logger.info(
        "%s: %.1f M parameters, %.1f M trained", what, _millions(model.parameters()), _millions(p for _, p in trainable)
    )
    return engine


def _millions(parameters: Any) -> float:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters) / 1e6


def lora_spec(cfg: TrainConfig) -> LoraSpec:
    """Return the shape of a configuration's adapters."""
    method = cfg.method
    return LoraSpec(
        rank=method.rank,
        alpha=float(method.rank if method.alpha is None else method.alpha),
        dropout=method.dropout,
        targets=method.targets if isinstance(method.targets, str) else tuple(method.targets),
        use_rslora=method.rslora,
        use_dora=method.dora,
    )


def add_adapters(cfg: TrainConfig, model: Any, expert: str, ds_config: dict[str, Any]) -> None:
    """Add a configuration's adapters to a transformer; those of `method.init_from` continue a LoRA file.

    Raises:
        ConfigError: targets match nothing, or the file has other targets or another rank.
        ModelError: the file cannot be read, is for another model or for the other expert.
    """
    spec = lora_spec(cfg)
    with gathered_for_libraries(ds_config):
        names = add_lora(model, spec, seed=seed_of(cfg.train.seed, "lora", expert) % 2**63)
    if path := cfg.method.init_from.get(expert):  # type: ignore[call-overload]
        found = read_lora(Path(path), component_of(expert))
        check_expert(Path(path), found.expert, expert)
        if any(module.magnitude_over_base for module in found.modules.values()):
            base = open_model(Path(cfg.model.path) / component_of(expert)).tensors
            found = with_magnitudes(found, base, over_base=False)
        continue_from(model, spec, names, found, path)


def method_record(cfg: TrainConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of the method, for resume and export.

    Args:
        cfg: a loaded configuration.
        config: config.json of a transformer.
    Raises:
        ConfigError: adapters have nothing to attach to.
    """
    method = cfg.method
    if method.kind == "full":
        return {"kind": "full"}
    stored = {"base_dtype": cfg.model.base_dtype} if cfg.model.base_dtype else {}
    if method.kind == "embedding":
        return {"kind": "embedding", "token": method.token, "num_vectors": method.num_vectors, **stored}
    spec = lora_spec(cfg)
    with torch.device("meta"):
        names = target_modules(empty_transformer(config), spec.targets)
    return {
        "kind": "lora",
        "rank": spec.rank,
        "alpha": spec.alpha,
        "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora,
        "targets": names,
        **stored,
    }
