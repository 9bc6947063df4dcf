"""From a configuration to a finished run: this module only calls builders."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_dist.config.check import check_paths
from wan_dist.config.document import dump_config
from wan_dist.config.schema import TrainConfig
from wan_dist.core.buckets import make_buckets
from wan_dist.core.errors import ConfigError, before_first_step
from wan_dist.core.order import Block
from wan_dist.io.run_folder import checkpoints_dir, describe_run, mark_failed, say_status, write_status
from wan_dist.models.wan.transformer import read_transformer_config
from wan_dist.models.wan.variants import WanVariant, get_variant
from wan_dist.parallel import dist
from wan_dist.parallel.dist import Ranks
from wan_dist.parallel.ds_config import accumulation_steps
from wan_dist.parallel.load import tensor_files
from wan_dist.parallel.sequence import check_heads
from wan_dist.parallel.shutdown import StopRequest
from wan_dist.train.averages import Average, AverageTensors
from wan_dist.train.build_data import Batches, open_batches
from wan_dist.train.build_flow import sigma_sampler
from wan_dist.train.embedding import COMPONENT, build_embedding_engine
from wan_dist.train.engines import DTYPES, build_engine, component_of, deepspeed_settings, method_record
from wan_dist.train.experts import Expert, ExpertDraw, check_agreement, expert_names, sigma_range
from wan_dist.train.hooks import CheckpointHook, SkipHook
from wan_dist.train.loop import TrainState, train
from wan_dist.train.objective import Objective
from wan_dist.train.objective_options import objective_options
from wan_dist.train.optimizers import check_extra
from wan_dist.train.resuming import claim, find_resume, resume, resume_averages, run_identity, trained_upon
from wan_dist.train.schedules import ScheduleShape, learning_rate
from wan_dist.train.watching import (
    Encoded,
    build_averages,
    check_watching,
    encode_watched,
    open_reports,
    watching_hooks,
)

logger = logging.getLogger(__name__)

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
    with before_first_step():
        check_paths(cfg)
        method = _check_transformers(cfg)
        check_extra(cfg.optim.name, cfg.optim.options)
        check_watching(cfg)
        ranks = grouped(cfg, ranks)
        num_accumulated = accumulation(cfg, ranks)
        dist.start(ranks, timeout_s=cfg.parallel.timeout_s)
        run_dir = Path(cfg.run_dir)
        batches, digest = build_batches(cfg, ranks)
        identity = run_identity(cfg, component_names(cfg), digest, method)
        claimed = claim(run_dir, ranks)
        identity["base_sha256"] = trained_upon(cfg, run_dir, ranks)
        checkpoint = find_resume(
            checkpoints_dir(run_dir), cfg.checkpoint.resume, identity, ranks, trusted=cfg.checkpoint.trust
        )
        # What was refused until here leaves the folder of the run that it would have changed as it was.
        ds_config = deepspeed_settings(cfg, ranks, num_accumulated)
        if ranks.is_main:
            describe_run(run_dir, config_yaml=dump_config(cfg), ds_config=ds_config, world_size=ranks.world_size)
            write_status(run_dir, "starting", num_steps=cfg.train.num_steps)
    try:
        with before_first_step():
            encoded = encode_watched(cfg, ranks)
            experts = build_experts(cfg, get_variant(cfg.model.variant), ds_config, ranks)
            state = resume(engines_of(experts), checkpoint)
            averages = build_averages(cfg, engines_of(experts), ranks)  # of the restored weights
            resume_averages(engines_of(experts), averages, checkpoint)
        _run(cfg, ranks, stop, experts, averages, encoded, batches, identity, state, on_step)
    except Exception as error:
        if ranks.is_main:
            mark_failed(run_dir, str(error) or repr(error), getattr(error, "exit_code", 1))
        raise
    finally:
        batches.close()
        if claimed:
            claimed.close()
    return _finish(run_dir, ranks, stop, state, cfg.train.num_steps)


def _check_transformers(cfg: TrainConfig) -> dict[str, Any]:
    """Return what a checkpoint says of the method, after a look at all that could refuse the start.

    Each transformer's files are there and of the variant, and adapters find their targets.
    """
    variant = get_variant(cfg.model.variant)
    configs = []
    for expert in expert_names(cfg, variant):
        folder = Path(cfg.model.path) / component_of(expert)
        configs.append(read_transformer_config(folder, variant))
        tensor_files(folder)
        check_heads(configs[-1]["num_attention_heads"], cfg.parallel.sequence_parallel)
    return method_record(cfg, configs[0])


def _run(
    cfg: TrainConfig,
    ranks: Ranks,
    stop: StopRequest,
    experts: Sequence[Expert],
    averages: Mapping[str, Average],
    encoded: Encoded,
    batches: Batches,
    identity: dict[str, Any],
    state: TrainState,
    on_step: OnStep,
) -> None:
    """Train from `state`, advanced in place, to the end or until told to stop, and save."""
    run_dir = Path(cfg.run_dir)
    reports = open_reports(cfg, ranks, component_names(cfg), on_step)
    saves = CheckpointHook(
        engines_of(experts),
        checkpoints_dir(run_dir),
        ranks,
        every=cfg.checkpoint.save_every,
        keep_last=cfg.checkpoint.keep_last,
        identity=identity,
        saved_step=state.step,  # 0, or what was resumed from
        zero_stage=cfg.parallel.zero_stage,
        exclude_frozen=cfg.method.kind != "full",
        keep_every=cfg.checkpoint.keep_every,
        asynchronous=cfg.checkpoint.asynchronous,
        ema=AverageTensors(averages) if averages else None,
    )
    watchers = watching_hooks(cfg, ranks, experts, averages, encoded, reports)
    skips = SkipHook(ranks, limit=cfg.train.max_skipped_steps)
    stop.progress = saves.progress
    try:
        train(
            _chooser(cfg, experts, ranks),
            batches,
            state,
            num_steps=cfg.train.num_steps,
            hooks=[skips, reports, *watchers, saves],
            should_stop=lambda: dist.any_rank(stop.requested, ranks),
        )
        saves.save_now(state)
    finally:
        reports.close()
        stop.progress = None
        saves.close()


def _chooser(cfg: TrainConfig, experts: Sequence[Expert], ranks: Ranks) -> Callable[[Block], Expert]:
    """Return what says which expert a block trains, after asking all ranks whether they agree."""
    variant = get_variant(cfg.model.variant)
    buckets = make_buckets(cfg.data.sizes, cfg.data.num_frames)
    draw = ExpertDraw(
        tuple(expert.name for expert in experts),
        sigma_sampler(cfg.flow, variant),
        variant.boundary,
        tuple(variant.num_tokens(bucket.num_frames, bucket.width, bucket.height) for bucket in buckets),
        cfg.train.seed,
    )
    if len(experts) > 1:
        logger.info("high_noise gets %.1f %% of the steps", 100 * draw.high_noise_share(0))

    def choose(block: Block) -> Expert:
        index = draw.index(block)
        if len(experts) > 1:
            highest = dist.max_over_ranks(float(index), ranks)
            check_agreement(-dist.max_over_ranks(-float(index), ranks), highest)
        return experts[index]

    return choose


def engines_of(experts: Sequence[Expert]) -> dict[str, Any]:
    """Return the engine of each component; experts that share one name it once."""
    return {expert.component: expert.engine for expert in experts}


def _finish(run_dir: Path, ranks: Ranks, stop: StopRequest, state: TrainState, num_steps: int) -> int:
    done = state.step >= num_steps
    # All ranks give the same answer, also those that no signal reached.
    code = 0 if done else int(dist.max_over_ranks(float(stop.exit_code()), ranks))
    if ranks.is_main:
        say_status(run_dir, "finished" if done else "stopped", step=state.step, num_steps=num_steps, exit_code=code)
        logger.info("%s after step %d of %d", "finished" if done else "stopped and saved", state.step, num_steps)
    dist.barrier()
    dist.stop()
    return code


def grouped(cfg: TrainConfig, ranks: Ranks) -> Ranks:
    """Return this process's place with the ranks in groups that share samples.

    Raises:
        ConfigError: the groups do not divide the ranks.
    """
    size = cfg.parallel.sequence_parallel
    if ranks.world_size % size:
        raise ConfigError(
            f"parallel.sequence_parallel = {size} does not divide the {ranks.world_size} ranks of this job; start it "
            f"with a multiple of {size}."
        )
    return dataclasses.replace(ranks, sequence_size=size)


def accumulation(cfg: TrainConfig, ranks: Ranks) -> int:
    """Return the forward passes per optimizer step on each rank; raises ConfigError if the batch does not divide."""
    return accumulation_steps(cfg.train.global_batch_size, cfg.train.micro_batch_size, ranks.data_world_size)


def build_batches(cfg: TrainConfig, ranks: Ranks) -> tuple[Batches, str]:
    """Return this rank's batches and the digest of the data and the rules that shape it."""
    return open_batches(cfg, ranks, DTYPES[cfg.model.dtype])


def build_experts(cfg: TrainConfig, variant: WanVariant, ds_config: dict[str, Any], ranks: Ranks) -> list[Expert]:
    """Return the noise ranges that a run trains, each with its engine; collective."""
    names = expert_names(cfg, variant)
    if cfg.method.kind == "embedding":
        parts = build_embedding_engine(cfg, variant, ds_config, ranks)
    else:
        built = {name: build_engine(cfg, variant, name, ds_config, ranks) for name in names}
        parts = {name: (engine, engine, context) for name, (engine, context) in built.items()}
    return [
        Expert(
            name=name,
            component=component_name(cfg, name),
            engine=engine,
            forward=forward,
            context=context,
            loss_scale=float(ranks.sequence_size),
            objective=build_objective(cfg, variant, name),
            lr_at=_learning_rates(cfg, name),
        )
        for name, (engine, forward, context) in parts.items()
    ]


def component_name(cfg: TrainConfig, expert: str) -> str:
    """Return what a checkpoint calls the thing that an expert's steps train."""
    return COMPONENT if cfg.method.kind == "embedding" else component_of(expert)


def component_names(cfg: TrainConfig) -> list[str]:
    """Return the components of a run, each once."""
    names = expert_names(cfg, get_variant(cfg.model.variant))
    return list(dict.fromkeys(component_name(cfg, name) for name in names))


def build_objective(cfg: TrainConfig, variant: WanVariant, expert: str) -> Objective:
    """Return the flow matching objective on the noise range of an expert."""
    sampler = sigma_sampler(cfg.flow, variant).within(*sigma_range(variant, expert))
    return Objective(sampler, DTYPES[cfg.model.dtype], cfg.train.seed, **objective_options(cfg, variant))


def _learning_rates(cfg: TrainConfig, expert: str) -> Callable[[int], float]:
    optim = cfg.optim
    peak = optim.expert_lr.get(expert, optim.lr)  # type: ignore[call-overload]

    def lr_at(step: int) -> float:
        return learning_rate(
            step,
            peak=peak,
            schedule=optim.schedule,
            warmup_steps=optim.warmup_steps,
            num_steps=cfg.train.num_steps,
            min_ratio=optim.min_lr_ratio,
            shape=ScheduleShape(optim.num_cycles, optim.decay_share),
        )

    return lr_at
