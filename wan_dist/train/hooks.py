"""What happens after steps: skipped ones named, states saved."""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_dist.core.errors import TrainingError
from wan_dist.io import checkpoint as checkpoints
from wan_dist.parallel.dist import Ranks, mean_over_ranks
from wan_dist.train.loop import StepResult, TrainState

logger = logging.getLogger(__name__)


class SkipHook:
    """Names the clips of steps that were skipped for a non-finite gradient, and ends a run that only skips."""

    def __init__(self, ranks: Ranks, *, limit: int) -> None:
        """Remember the limit.

        Args:
            ranks: this process's place.
            limit: skipped steps in a row that end training.
        """
        self._ranks, self._limit = ranks, limit
        self._in_a_row = 0

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Count, name, and end training when the limit is reached; every rank sees the same steps skipped."""
        if not result.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        losses = result.sample_losses.tolist()
        clips = ", ".join(f"{key} (loss {loss:.4g})" for key, loss in zip(result.keys, losses, strict=True))
        logger.warning(
            "step %d was skipped, a gradient is not finite; rank %d had %s", state.step, self._ranks.rank, clips
        )
        if self._in_a_row >= self._limit:
            raise TrainingError(
                f"step {state.step}: {self._limit} steps in a row had a gradient that is not finite "
                "(train.max_skipped_steps); training stops, the last checkpoint is untouched. Lower optim.lr, or look "
                "at the clips that were named."
            )


class CheckpointHook:
    """Saves every `every` steps and, through `save_now`, whenever asked."""

    def __init__(
        self,
        engines: Mapping[str, Any],
        root: Path,
        ranks: Ranks,
        *,
        every: int,
        keep_last: int,
        identity: dict[str, Any],
        saved_step: int,
        zero_stage: int,
        exclude_frozen: bool,
    ) -> None:
        """Remember where and what to save.

        Args:
            engines: the DeepSpeed engine of each trained component.
            root: the run's checkpoints folder.
            ranks: this process's place.
            every: steps between saves; 0 only when asked.
            keep_last: checkpoints kept.
            identity: JSON values that a resume must find unchanged, and what export needs.
            saved_step: the step that is on disk already, or 0.
            zero_stage: ZeRO stage of the engines.
            exclude_frozen: leave weights that are not trained out of checkpoints.
        """
        self._engines, self._root, self._ranks = engines, root, ranks
        self._zero_stage, self._exclude_frozen = zero_stage, exclude_frozen
        self._every, self._keep_last, self._identity = every, keep_last, identity
        self._saved_step = saved_step

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Save when due."""
        if self._every and state.step % self._every == 0:
            self._check_finite(state, result)
            self.save_now(state)

    def save_now(self, state: TrainState) -> None:
        """Save this state unless it is on disk already; collective."""
        if self._saved_step == state.step:
            return
        started = time.perf_counter()
        payload = {
            **self._identity,
            "epoch": state.epoch,
            "block": state.block,
            "component_steps": state.component_steps,
        }
        folder = checkpoints.save(
            self._engines,
            self._root,
            state.step,
            payload,
            zero_stage=self._zero_stage,
            exclude_frozen=self._exclude_frozen,
        )
        self._saved_step = state.step
        if self._ranks.is_main:
            logger.info("saved %s in %.1f s", folder, time.perf_counter() - started)
            checkpoints.prune(self._root, self._keep_last)

    def _check_finite(self, state: TrainState, result: StepResult) -> None:
        if not result.skipped and not math.isfinite(mean_over_ranks(float(result.loss.item()), self._ranks)):
            raise TrainingError(f"step {state.step}: the loss is not finite; this state is not saved. Lower optim.lr.")
