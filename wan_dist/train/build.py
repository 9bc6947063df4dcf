"""From a configuration to a finished run: this module only calls builders."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from wan_dist.config.check import check_paths
from wan_dist.config.document import dump_config
from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import CheckpointError
from wan_dist.io import checkpoint as checkpoints
from wan_dist.io.checkpoint import Checkpoint
from wan_dist.io.run_folder import checkpoints_dir, claim_run, describe_run, mark_failed, write_status
from wan_dist.models.wan.transformer import (
    empty_transformer,
    read_transformer_config,
    rebuild_rope,
    transformer_folder,
)
from wan_dist.models.wan.variants import WanVariant, get_variant
from wan_dist.parallel import dist
from wan_dist.parallel.dist import Ranks
from wan_dist.parallel.ds_config import accumulation_steps, deepspeed_config
from wan_dist.parallel.environment import build_guard
from wan_dist.parallel.load import build_partitioned, fill_partitions, tensor_files
from wan_dist.parallel.shutdown import StopRequest
from wan_dist.train.build_data import Batches, open_batches
from wan_dist.train.build_flow import sigma_sampler
from wan_dist.train.hooks import CheckpointHook, ReportHook
from wan_dist.train.loop import TrainState, train
from wan_dist.train.objective import Objective
from wan_dist.train.objective_options import objective_options
from wan_dist.train.optimizers import OPTIMIZERS, OptimizerOptions
from wan_dist.train.schedules import learning_rate

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A resumed run would not be the same run if one of these differed; the model folder may have moved.
_UNCHANGED = ("variant", "components", "method", "data_digest", "seed", "global_batch_size")
OnStep = Callable[[TrainState, float | None], None]


def run_training(cfg: TrainConfig, ranks: Ranks, stop: StopRequest, on_step: OnStep) -> int:
    """Train as configured on the ranks that were started, and return the process's exit status.

    Args:
        cfg: a loaded configuration.
        ranks: this process's place; its peers call this with the same configuration.
        stop: tells when to leave early.
        on_step: drives a progress bar on rank 0.

    Raises:
        WanDistError: anything that the user can mend.
    """
    check_paths(cfg)
    _check_transformer(cfg)
    num_accumulated = accumulation(cfg, ranks.world_size)
    dist.start(ranks, timeout_s=cfg.parallel.timeout_s)
    run_dir = Path(cfg.run_dir)
    batches, digest = build_batches(cfg, ranks)
    identity = run_identity(cfg, digest)
    claim = _claim(run_dir, ranks)
    checkpoint = find_resume(checkpoints_dir(run_dir), cfg.checkpoint.resume, identity, ranks)
    # What was refused until here leaves the folder of the run that it would have changed as it was.
    ds_config = deepspeed_settings(cfg, ranks, num_accumulated)
    if ranks.is_main:
        describe_run(run_dir, config_yaml=dump_config(cfg), ds_config=ds_config, world_size=ranks.world_size)
        write_status(run_dir, "starting", num_steps=cfg.train.num_steps)
    try:
        engine = build_engine(cfg, get_variant(cfg.model.variant), ds_config, ranks)
        engines = dict.fromkeys(identity["components"], engine)
        state = resume(engines, checkpoint, exclude_frozen=cfg.method.kind != "full")
        _run(cfg, ranks, stop, engines, batches, identity, state, on_step)
    except Exception as error:
        if ranks.is_main:
            mark_failed(run_dir, str(error) or repr(error))
        raise
    finally:
        batches.close()
        if claim:
            claim.close()
    return _finish(run_dir, ranks, stop, state, cfg.train.num_steps)


def _claim(run_dir: Path, ranks: Ranks) -> IO[str] | None:
    """Return rank 0's claim on the run folder, None elsewhere; collective, refused on all ranks alike."""
    claim, problem = None, None
    if ranks.is_main:
        try:
            claim = claim_run(run_dir)
        except CheckpointError as error:
            problem = str(error)
    if problem := dist.from_main(problem, ranks):
        raise CheckpointError(problem)
    return claim


def _check_transformer(cfg: TrainConfig) -> None:
    """Return if the transformer's files are there and of the variant, before anything slow starts."""
    folder = transformer_folder(Path(cfg.model.path), cfg.model.expert)
    read_transformer_config(folder, get_variant(cfg.model.variant))
    tensor_files(folder)


def _run(
    cfg: TrainConfig,
    ranks: Ranks,
    stop: StopRequest,
    engines: Mapping[str, Any],
    batches: Batches,
    identity: dict[str, Any],
    state: TrainState,
    on_step: OnStep,
) -> None:
    """Train from `state`, advanced in place, to the end or until told to stop, and save."""
    run_dir = Path(cfg.run_dir)
    (engine,) = engines.values()
    reports = ReportHook(
        run_dir,
        ranks,
        every=cfg.log.every,
        num_steps=cfg.train.num_steps,
        tensorboard=cfg.log.tensorboard,
        grad_norm=lambda: float(engine.get_global_grad_norm()),
        on_step=on_step,
    )
    saves = CheckpointHook(
        engines,
        checkpoints_dir(run_dir),
        ranks,
        every=cfg.checkpoint.save_every,
        keep_last=cfg.checkpoint.keep_last,
        identity=identity,
        saved_step=state.step,  # 0, or what was resumed from
        zero_stage=engine.zero_optimization_stage(),
        exclude_frozen=cfg.method.kind != "full",
    )
    try:
        train(
            engine,
            build_objective(cfg, get_variant(cfg.model.variant)),
            batches,
            state,
            num_steps=cfg.train.num_steps,
            lr_at=lambda step: _learning_rate(cfg, step),
            hooks=[reports, saves],
            should_stop=lambda: dist.any_rank(stop.requested, ranks),
        )
        saves.save_now(state)
    finally:
        reports.close()


def _finish(run_dir: Path, ranks: Ranks, stop: StopRequest, state: TrainState, num_steps: int) -> int:
    done = state.step >= num_steps
    # All ranks give the same answer, also those that no signal reached.
    code = 0 if done else int(dist.max_over_ranks(float(stop.exit_code()), ranks))
    if ranks.is_main:
        write_status(run_dir, "finished" if done else "stopped", step=state.step, num_steps=num_steps, exit_code=code)
        logger.info("%s after step %d of %d", "finished" if done else "stopped and saved", state.step, num_steps)
    dist.barrier()
    dist.stop()
    return code


def accumulation(cfg: TrainConfig, world_size: int) -> int:
    """Return the forward passes per optimizer step on each rank; raises ConfigError if the batch does not divide."""
    return accumulation_steps(cfg.train.global_batch_size, cfg.train.micro_batch_size, world_size)


def deepspeed_settings(cfg: TrainConfig, ranks: Ranks, num_accumulated: int) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run."""
    return deepspeed_config(
        micro_batch_size=cfg.train.micro_batch_size,
        accumulation_steps=num_accumulated,
        world_size=ranks.world_size,
        dtype=cfg.model.dtype,
        max_grad_norm=cfg.optim.max_grad_norm,
        offload_optimizer=cfg.parallel.offload_optimizer,
        offload_param=cfg.parallel.offload_param,
        pin_memory=ranks.device.type != "cpu",
        extra=cfg.parallel.deepspeed,
    )


def build_batches(cfg: TrainConfig, ranks: Ranks) -> tuple[Batches, str]:
    """Return this rank's batches and the digest of the data and the rules that shape it."""
    return open_batches(cfg, ranks, DTYPES[cfg.model.dtype])


def build_objective(cfg: TrainConfig, variant: WanVariant) -> Objective:
    """Return the flow matching objective, on the noise range of the configured expert."""
    sampler = sigma_sampler(cfg.flow, variant)
    if variant.boundary is not None:
        high = cfg.model.expert == "high_noise"
        sampler = sampler.within(variant.boundary, 1.0) if high else sampler.within(0.0, variant.boundary)
    return Objective(sampler, DTYPES[cfg.model.dtype], cfg.train.seed, **objective_options(cfg, variant))


def build_engine(cfg: TrainConfig, variant: WanVariant, ds_config: dict[str, Any], ranks: Ranks) -> Any:
    """Return the DeepSpeed engine around the pretrained transformer, partitioned from its first byte on."""
    import deepspeed

    folder = transformer_folder(Path(cfg.model.path), cfg.model.expert)
    config = read_transformer_config(folder, variant)
    model: Any = build_partitioned(lambda: empty_transformer(config), ds_config)
    rebuild_rope(model)
    fill_partitions(model, folder)
    model.to(ranks.device)  # buffers; the partitions are where DeepSpeed put them
    model.train()
    if cfg.train.gradient_checkpointing == "block":
        model.enable_gradient_checkpointing()
    offloaded = cfg.parallel.offload_optimizer == "cpu" and ranks.device.type != "cpu"
    options = OptimizerOptions(cfg.optim.lr, cfg.optim.betas, cfg.optim.eps, cfg.optim.weight_decay, offloaded)
    # Only an accelerator whose optimizer is offloaded makes DeepSpeed compile something.
    with build_guard(builds=offloaded):
        optimizer = OPTIMIZERS[cfg.optim.name](model.parameters(), options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    logger.info("%s: %.1f M parameters", folder, sum(p.ds_numel for p in model.parameters()) / 1e6)
    return engine


def run_identity(cfg: TrainConfig, data_digest: str) -> dict[str, Any]:
    """Return what identifies a run in its checkpoints, for resume and for export."""
    return {
        "variant": cfg.model.variant,
        "model_path": str(Path(cfg.model.path).resolve()),
        "components": [transformer_folder(Path(cfg.model.path), cfg.model.expert).name],
        "method": {"kind": cfg.method.kind},
        "dtype": cfg.model.dtype,
        "data_digest": data_digest,
        "seed": cfg.train.seed,
        "global_batch_size": cfg.train.global_batch_size,
    }


def find_resume(root: Path, mode: str, identity: dict[str, Any], ranks: Ranks) -> Checkpoint | None:
    """Return the checkpoint to continue from, None for a fresh run; collective.

    Raises:
        CheckpointError: `mode` is require and there is none, never and there is one, or the run was another one.
    """
    found = checkpoints.newest_whole(root) if ranks.is_main and mode != "never" else None
    checkpoint = dist.from_main(found, ranks)
    if checkpoint is None:
        if mode == "require":
            raise CheckpointError(f"{root}: checkpoint.resume is require, and no whole checkpoint is there.")
        if checkpoints.step_folders(root):
            reason = "checkpoint.resume is never" if mode == "never" else "none of them is whole"
            raise CheckpointError(f"{root}: has checkpoints, but {reason}; choose another run_dir or delete them.")
        return None
    for name in _UNCHANGED:
        before, now = checkpoint.state.get(name), identity[name]
        if before != now:
            raise CheckpointError(
                f"{checkpoint.folder}: was saved with {name} = {before}, this run has {now}; "
                "restore it, or choose another run_dir."
            )
    checkpoints.check_world_size(checkpoint, ranks.world_size)
    if ranks.is_main:
        checkpoints.set_aside_newer(root, checkpoint.step)
    return checkpoint


def resume(engines: Mapping[str, Any], checkpoint: Checkpoint | None, *, exclude_frozen: bool) -> TrainState:
    """Return where to continue, the engines restored; a fresh state without a checkpoint."""
    if checkpoint is None:
        return TrainState()
    checkpoints.restore(engines, checkpoint, exclude_frozen=exclude_frozen)
    logger.info("resumed from %s", checkpoint.folder)
    return TrainState(checkpoint.step, checkpoint.state["epoch"], checkpoint.state["block"])


def _learning_rate(cfg: TrainConfig, step: int) -> float:
    optim = cfg.optim
    return learning_rate(
        step,
        peak=optim.lr,
        schedule=optim.schedule,
        warmup_steps=optim.warmup_steps,
        num_steps=cfg.train.num_steps,
        min_ratio=optim.min_lr_ratio,
    )
