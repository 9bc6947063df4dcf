"""Continuing a run: what identifies it, which checkpoint it goes on from, and everything back in its place."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import CheckpointError
from wan_dist.io import checkpoint as checkpoints
from wan_dist.io.base_weights import base_digests
from wan_dist.io.checkpoint import Checkpoint
from wan_dist.io.restoring import restore, restore_averages
from wan_dist.io.run_folder import claim_run
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel import dist
from wan_dist.parallel.dist import Ranks
from wan_dist.train.averages import Average, ExponentialAverage
from wan_dist.train.engines import component_of
from wan_dist.train.experts import expert_names
from wan_dist.train.loop import TrainState

logger = logging.getLogger(__name__)

# A resumed run would not be the same run if one of these differed; the model folder may have moved.
_UNCHANGED = ("variant", "components", "method", "base_sha256", "data_digest", "seed", "global_batch_size", "optimizer")


def claim(run_dir: Path, ranks: Ranks) -> IO[str] | None:
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


def trained_upon(cfg: TrainConfig, run_dir: Path, ranks: Ranks) -> dict[str, str]:
    """Return the digests of the weights that a run trains upon and does not save; collective, none for a full run."""
    if cfg.method.kind == "full":
        return {}
    names = list(dict.fromkeys(component_of(e) for e in expert_names(cfg, get_variant(cfg.model.variant))))
    digests = base_digests(Path(cfg.model.path), names, run_dir) if ranks.is_main else {}
    return dist.from_main(digests, ranks)


def run_identity(
    cfg: TrainConfig, components: Sequence[str], data_digest: str, method: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what identifies a run in its checkpoints, for resume and for export.

    Args:
        cfg: a loaded configuration.
        components: what it trains.
        data_digest: of the data and the rules that shape it.
        method: from `engines.method_record`.
    """
    return {
        "variant": cfg.model.variant,
        "model_path": str(Path(cfg.model.path).resolve()),
        "components": list(components),
        "method": dict(method),
        "data_digest": data_digest,
        "seed": cfg.train.seed,
        "global_batch_size": cfg.train.global_batch_size,
        "dtype": cfg.model.dtype,
        "optimizer": cfg.optim.name,
    }


def find_resume(
    root: Path, mode: str, identity: dict[str, Any], ranks: Ranks, *, trusted: bool = False
) -> Checkpoint | None:
    """Return the checkpoint to continue from, None for a fresh run; collective.

    Raises:
        CheckpointError: `mode` is require and there is none, never and there is one, the run was another one,
            or another user wrote it and it is not `trusted`.
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
    problem = None
    if ranks.is_main:
        try:
            checkpoint.require_own(trusted=trusted, option="checkpoint.trust=true")
            checkpoints.set_aside_newer(root, checkpoint.step)
        except (CheckpointError, OSError) as error:
            problem = str(error)
    if problem := dist.from_main(problem, ranks):
        raise CheckpointError(problem)
    return checkpoint


def resume(engines: Mapping[str, Any], checkpoint: Checkpoint | None) -> TrainState:
    """Return where to continue, the engines restored; a fresh state without a checkpoint.

    Args:
        engines: the DeepSpeed engine of each component, fresh.
        checkpoint: from `find_resume`.
    """
    if checkpoint is None:
        return TrainState()
    restore(engines, checkpoint, exclude_frozen=checkpoint.state["method"]["kind"] != "full")
    logger.info("resumed from %s", checkpoint.folder)
    state = checkpoint.state
    return TrainState(checkpoint.step, state["epoch"], state["block"], dict(state["component_steps"]))


def resume_averages(engines: Mapping[str, Any], averages: Mapping[str, Average], checkpoint: Checkpoint | None) -> None:
    """Fill running averages with those of a checkpoint; one that it does not hold starts from the restored weights.

    Args:
        engines: the engine of each component, restored.
        averages: by component, started from the engines' weights as they are now.
        checkpoint: from `find_resume`.
    """
    if checkpoint is None:
        return
    # The average of schedule-free AdamW is computed from the optimizer's state, which is restored.
    targets = {name: avg.tensors() for name, avg in averages.items() if isinstance(avg, ExponentialAverage)}
    for component in restore_averages(engines, checkpoint, targets):
        logger.info(
            "%s: holds no running average of %s; it starts from the restored weights", checkpoint.folder, component
        )
