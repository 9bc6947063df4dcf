"""What training says while it runs: losses by expert and noise level, speed, use of the hardware, time left."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from wan_dist.core.errors import WanDistError
from wan_dist.io.run_folder import METRICS_NAME, keep_metrics_before, write_status
from wan_dist.parallel.dist import Ranks
from wan_dist.train.loop import StepResult, TrainState
from wan_dist.train.report_sinks import Lenient, MetricsFile, Sink, TensorBoard, Wandb
from wan_dist.train.throughput import Throughput, memory_gib

logger = logging.getLogger(__name__)

NUM_DECILES = 10
SMOOTHING = 0.98
"""Decay per step of the smoothed loss: about the last 50 steps."""


class ReportHook:
    """Every `every` steps: one log line, and a report to every sink and to status.json.

    Losses are means over the ranks and over the steps since the last report. Values on the device are read then, and
    not before: reading one waits for the device.
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
        throughput: Throughput | None = None,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Remember where to report; rank 0 opens the files at the first step.

        Args:
            run_dir: the run folder.
            ranks: this process's place.
            every: steps between reports.
            num_steps: steps of the whole run, for the remaining time.
            tensorboard: write TensorBoard events.
            on_step: told of every step and, where one was just computed, the mean loss; drives a progress bar.
            throughput: counts operations; None leaves MFU out.
            wandb_project: report to wandb too.
            config: what wandb shows of the configuration.
        """
        self._run_dir, self._ranks, self._every, self._num_steps = run_dir, ranks, every, num_steps
        self._on_step, self._throughput = on_step, throughput
        self._tensorboard, self._wandb_project, self._config = tensorboard, wandb_project, config or {}
        self._pending: list[StepResult] = []
        self._num_skipped = 0
        self._smoothed: float | None = None
        self._sinks: list[Sink] = []
        self._opened = not ranks.is_main
        self._status_warned = False

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Collect, and report when due."""
        self.open(state.step)
        if result.skipped:
            self._num_skipped += 1
        else:
            self._pending.append(result)
        mean_loss = None
        if self._pending and (state.step % self._every == 0 or state.step == self._num_steps):
            mean_loss = self._report(state)
        if self._ranks.is_main:
            self._on_step(state, mean_loss)

    def write(self, row: Mapping[str, Any]) -> None:
        """Give a row of something else, such as validation, to the sinks; on rank 0, nothing on the others."""
        self.open(row["step"])
        for sink in self._sinks:
            sink.write(row)

    def sinks(self, step: int) -> Sequence[Sink]:
        """Return the open sinks, none but on rank 0."""
        self.open(step)
        return self._sinks

    def close(self) -> None:
        """Flush and close the sinks; never raises."""
        for sink in self._sinks:
            sink.close()

    def open(self, first_step: int) -> None:
        """Forget what a run reported from `first_step` on before it was killed: those steps are done again."""
        if self._opened:
            return
        self._opened = True
        metrics = self._run_dir / METRICS_NAME
        try:
            keep_metrics_before(metrics, first_step)
        except OSError as error:
            logger.warning("%s: keeps rows of step %d and later that are done again: %s", metrics, first_step, error)
        if metrics.is_file():
            self._smoothed = next(
                (v for v in map(_smoothed_of, reversed(metrics.read_text().splitlines())) if v is not None), None
            )
        self._sinks.append(Lenient(MetricsFile(self._run_dir)))
        if self._tensorboard:
            self._sinks.append(Lenient(TensorBoard(self._run_dir, first_step)))
        if self._wandb_project:
            self._open_wandb(self._wandb_project)

    def _open_wandb(self, project: str) -> None:
        try:
            self._sinks.append(Lenient(Wandb(self._run_dir, project, self._config)))
        except WanDistError:
            raise
        except Exception as error:  # no network, no key: whatever wandb raises
            logger.warning("this run is not reported to wandb: %s", error)

    def _report(self, state: TrainState) -> float:
        pending, self._pending = self._pending, []
        losses, by_sigma, by_expert = self._losses(pending)
        row: dict[str, Any] = {"step": state.step, "epoch": state.epoch, "loss": sum(losses) / len(losses)}
        for loss in losses:
            self._smoothed = loss if self._smoothed is None else SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        row |= {
            "loss_smooth": self._smoothed,
            "grad_norm": float(pending[-1].grad_norm),
            "lr": pending[-1].lr,
            "loss_by_expert": by_expert,
            "loss_by_sigma": by_sigma,
            "lr_by_component": {result.component: result.lr for result in pending},
            "num_skipped": self._num_skipped,
            **self._speed(pending),
        }
        if self._ranks.is_main:
            self._write(row)
        return row["loss"]

    def _losses(
        self, pending: Sequence[StepResult]
    ) -> tuple[list[float], dict[str, float | None], dict[str, float | None]]:
        """Return each step's loss, and samples' mean losses by decile of sigma and by expert, over all ranks."""
        experts = sorted({result.expert for result in pending})
        sums = torch.zeros(2, NUM_DECILES + len(experts), dtype=torch.float64)
        for result in pending:
            samples = result.sample_losses.double().cpu()
            deciles = (result.sigma.double().cpu() * NUM_DECILES).long().clamp(0, NUM_DECILES - 1)
            sums[0].index_add_(0, deciles, samples)
            sums[1].index_add_(0, deciles, torch.ones_like(samples))
            place = NUM_DECILES + experts.index(result.expert)
            sums[0, place] += samples.sum()
            sums[1, place] += len(samples)
        steps = torch.stack([result.loss.double() for result in pending]).cpu() / self._ranks.world_size
        gathered = torch.cat([steps, sums.flatten()]).to(self._ranks.device)
        torch.distributed.all_reduce(gathered)
        values = gathered.cpu()
        total, count = values[len(pending) :].view(2, -1)
        means = [float(t / n) if n else None for t, n in zip(total, count, strict=True)]
        return (
            values[: len(pending)].tolist(),
            decile_names(means),
            dict(zip(experts, means[NUM_DECILES:], strict=True)),
        )

    def _speed(self, pending: Sequence[StepResult]) -> dict[str, float | None]:
        """Return times, rates and memory; of the slowest and fullest rank where ranks differ."""
        count = len(pending)
        step_s = sum(r.step_s for r in pending) / count
        device_gib, host_gib = memory_gib(self._ranks.device)
        highest = torch.tensor(
            [step_s, sum(r.data_wait_s for r in pending) / count, device_gib, host_gib],
            dtype=torch.float64,
            device=self._ranks.device,
        )
        torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
        step_s, data_wait_s, device_gib, host_gib = highest.tolist()
        needed = done = 0.0
        for result in pending if self._throughput else ():
            assert self._throughput
            step_needed, step_done = self._throughput.flops(result.component, len(result.keys), result.num_tokens)
            needed, done = needed + step_needed, done + step_done
        rates = torch.tensor(
            [sum(r.num_tokens for r in pending), needed, done], dtype=torch.float64, device=self._ranks.device
        )
        torch.distributed.all_reduce(rates)
        # The ranks of a sequence group count the same samples.
        num_tokens, needed, done = (rates / self._ranks.sequence_size).tolist()
        seconds, num_ranks = step_s * count, self._ranks.world_size
        values: dict[str, float | None] = {
            "step_s": step_s,
            "data_wait_s": data_wait_s,
            "tokens_per_s": num_tokens / seconds if seconds else None,
            "tflops_per_device": needed / seconds / num_ranks / 1e12 if needed and seconds else None,
            "mfu": self._throughput.use(needed / num_ranks, seconds) if self._throughput else None,
            "hfu": self._throughput.use(done / num_ranks, seconds) if self._throughput else None,
            "device_memory_gib": device_gib,
            "host_memory_gib": host_gib,
        }
        return {name: value for name, value in values.items() if value is not None}

    def _write(self, row: dict[str, Any]) -> None:
        remaining_s = (self._num_steps - row["step"]) * row["step_s"]
        mfu = f"  MFU {100 * row['mfu']:.1f} %" if "mfu" in row else ""
        logger.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.2f s/step%s  ETA %s",
            *(row["step"], self._num_steps, row["loss"], row["grad_norm"], row["lr"], row["step_s"], mfu),
            _clock(remaining_s),
        )
        self.write(row)
        try:
            write_status(self._run_dir, "training", num_steps=self._num_steps, eta_s=remaining_s, **row)
        except OSError as error:
            if not self._status_warned:
                logger.warning(
                    "status.json of step %d could not be written: %s. This is not said again.", row["step"], error
                )
            self._status_warned = True


def decile_names(means: Sequence[float | None]) -> dict[str, float | None]:
    """Return values of the ten tenths of sigma, [0, 0.1) first, by name."""
    return {f"{k / NUM_DECILES:.1f}-{(k + 1) / NUM_DECILES:.1f}": means[k] for k in range(NUM_DECILES)}


def _smoothed_of(line: str) -> float | None:
    try:
        return json.loads(line).get("loss_smooth")
    except ValueError:
        return None  # torn, and the disk too full to drop it


def _clock(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86_400)
    return f"{days}d " * bool(days) + time.strftime("%H:%M:%S", time.gmtime(rest))
