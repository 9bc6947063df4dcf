"""What happens after steps: skipped ones named, states saved."""

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from wan_dist.core.errors import CheckpointError, TrainingError
from wan_dist.io.run_folder import write_status
from wan_dist.io.saving import Outcome, Saver
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
    """Saves every `every` steps and, through `save_now`, whenever asked; training waits for a snapshot only."""

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
        keep_every: int = 0,
        asynchronous: bool = True,
        ema: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Remember where and what to save.

        Args:
            engines: the DeepSpeed engine of each trained component.
            root: the run's checkpoints folder.
            ranks: this process's place.
            every: steps between saves; 0 only when asked.
            keep_last: newest checkpoints kept.
            identity: JSON values that a resume must find unchanged, and what export needs.
            saved_step: the step that is on disk already, or 0.
            zero_stage: ZeRO stage of the engines.
            exclude_frozen: leave weights that are not trained out of checkpoints.
            keep_every: steps whose multiples are kept for good; 0 for none.
            asynchronous: write while training goes on.
            ema: this rank's averaged flat tensors by component.
        """
        self._engines, self._run_dir, self._ranks, self._ema = engines, root.parent, ranks, ema
        self._zero_stage, self._exclude_frozen = zero_stage, exclude_frozen
        self._every, self._identity, self._asynchronous = every, identity, asynchronous
        self._saved_step = saved_step
        self._saver = Saver(root, ranks.device, asynchronous=asynchronous, keep_last=keep_last, keep_every=keep_every)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Commit the save under way if it is written, and begin the next one when due."""
        self._tell(self._saver.poll())
        if self._every and state.step % self._every == 0:
            self._check_finite(state, result)
            self._tell(self._saver.wait())
            self._start(state)
            if not self._asynchronous:
                self._tell(self._saver.wait())

    def save_now(self, state: TrainState) -> None:
        """Save this state unless it is on disk already, and wait for it; collective.

        Raises:
            CheckpointError: it could not be saved.
        """
        self._tell(self._saver.wait())
        if self._saved_step == state.step:
            return
        if self._ranks.is_main:
            with contextlib.suppress(OSError):
                write_status(self._run_dir, "saving", step=state.step)
        self._start(state)
        outcome = self._tell(self._saver.wait())
        if outcome and outcome.problem:
            kept = f"step {self._saved_step} is the last one saved" if self._saved_step else "nothing was saved before"
            raise CheckpointError(f"step {state.step} could not be saved: {outcome.problem}; {kept}.")

    def progress(self) -> object | None:
        """Return what changes while a save makes progress, None with no save under way; any thread may ask."""
        return self._saver.progress()

    def close(self) -> None:
        """End the writer process; a save that was not committed is lost."""
        self._saver.close()

    def _start(self, state: TrainState) -> None:
        payload = {
            **self._identity,
            "epoch": state.epoch,
            "block": state.block,
            "component_steps": state.component_steps,
        }
        self._saver.start(
            self._engines,
            state.step,
            payload,
            zero_stage=self._zero_stage,
            exclude_frozen=self._exclude_frozen,
            ema=self._ema,
        )

    def _tell(self, outcome: Outcome | None) -> Outcome | None:
        """Log how a save ended, on rank 0, and return it."""
        if outcome is None:
            return None
        if outcome.problem is None:
            self._saved_step = outcome.step
        if self._ranks.is_main and outcome.problem:
            logger.error(
                "step %d was NOT saved: %s. The previous checkpoint is untouched; the next save tries again.",
                *(outcome.step, outcome.problem),
            )
        elif self._ranks.is_main:
            logger.info("saved %s in %.1f s; training waited %.2f s", outcome.folder, outcome.total_s, outcome.stall_s)
        return outcome

    def _check_finite(self, state: TrainState, result: StepResult) -> None:
        if not result.skipped and not math.isfinite(mean_over_ranks(float(result.loss.item()), self._ranks)):
            raise TrainingError(f"step {state.step}: the loss is not finite; this state is not saved. Lower optim.lr.")
