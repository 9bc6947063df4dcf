"""What happens after steps: reporting and saving."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wan_dist.core.errors import TrainingError
from wan_dist.io import checkpoint as checkpoints
from wan_dist.io.run_folder import METRICS_NAME, keep_metrics_before, write_status
from wan_dist.parallel.dist import Ranks, max_over_ranks, mean_over_ranks
from wan_dist.train.loop import StepResult, TrainState

logger = logging.getLogger(__name__)


class ReportHook:
    """Every `every` steps: one log line, one row in metrics.jsonl, TensorBoard points and status.json.

    Losses are averaged over the ranks and over the steps since the last report.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        *,
        every: int,
        num_steps: int,
        tensorboard: bool,
        on_step: Callable[[TrainState, float | None], None],
    ) -> None:
        """Remember where to report; rank 0 opens the files at the first step.

        Args:
            run_dir: the run folder.
            ranks: this process's place.
            every: steps between reports.
            num_steps: steps of the whole run, for the remaining time.
            tensorboard: write TensorBoard events.
            on_step: told of every step and, where one was just computed, the mean loss; drives a progress bar.
        """
        self._run_dir, self._ranks, self._every, self._num_steps = run_dir, ranks, every, num_steps
        self._on_step = on_step
        self._pending: list[StepResult] = []
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._opened = not ranks.is_main

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Collect, and report when due."""
        if not self._opened:
            self._open(state.step)
        if not result.skipped:
            self._pending.append(result)
        mean_loss = None
        if self._pending and (state.step % self._every == 0 or state.step == self._num_steps):
            mean_loss = self._report(state)
        if self._ranks.is_main:
            self._on_step(state, mean_loss)

    def close(self) -> None:
        """Flush and close the TensorBoard events."""
        if self._writer:
            self._writer.close()

    def _open(self, first_step: int) -> None:
        """Forget what a run reported from `first_step` on before it was killed: those steps are done again."""
        self._opened = True
        keep_metrics_before(self._run_dir / METRICS_NAME, first_step)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._run_dir), purge_step=first_step)

    def _report(self, state: TrainState) -> float:
        pending, self._pending = self._pending, []
        count = len(pending)
        loss = mean_over_ranks(sum(float(r.loss.item()) for r in pending) / count, self._ranks)
        step_s = max_over_ranks(sum(r.step_s for r in pending) / count, self._ranks)
        data_wait_s = max_over_ranks(sum(r.data_wait_s for r in pending) / count, self._ranks)
        row = {
            "step": state.step,
            "epoch": state.epoch,
            "loss": loss,
            "grad_norm": float(pending[-1].grad_norm),
            "lr": pending[-1].lr,
            "step_s": step_s,
            "data_wait_s": data_wait_s,
        }
        if self._ranks.is_main:
            self._write(row)
        return loss

    def _write(self, row: dict[str, Any]) -> None:
        remaining_s = (self._num_steps - row["step"]) * row["step_s"]
        logger.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.2f s/step  ETA %s",
            *(row["step"], self._num_steps, row["loss"], row["grad_norm"], row["lr"], row["step_s"]),
            time.strftime("%H:%M:%S", time.gmtime(remaining_s)),
        )
        try:
            # Metrics must never end a run: on a full disk even TensorBoard raises in the caller (tensorboard 2.21).
            with (self._run_dir / "metrics.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")
            if self._writer:
                for name in ("loss", "grad_norm", "lr", "step_s", "data_wait_s"):
                    self._writer.add_scalar(f"train/{name}", row[name], row["step"])
            write_status(self._run_dir, "training", num_steps=self._num_steps, eta_s=remaining_s, **row)
        except OSError as error:
            logger.warning("metrics of step %d could not be written: %s", row["step"], error)


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
