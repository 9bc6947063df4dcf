"""The loss on held-out clips, comparable between steps, runs, settings and numbers of ranks.

Every clip is noised with the same noise at the same noise levels each time: both are keyed by the clip's key and by
nothing else. The levels are those of the official schedule, uniform before the official shift, whatever the run draws
in training; the loss is the mean squared error, unweighted.
"""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from wan_dist.core.errors import DataError
from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.core.rng import seed_of
from wan_dist.data.batching import Batch
from wan_dist.data.clips import ClipDataset
from wan_dist.data.encode import Encoders
from wan_dist.parallel.dist import Ranks
from wan_dist.train.averages import Average, averaged_weights
from wan_dist.train.experts import Expert
from wan_dist.train.loop import StepResult, TrainState
from wan_dist.train.objective import Objective
from wan_dist.train.reports import NUM_DECILES, ReportHook, decile_names

SEED = 20_220_816
"""Seed of noise and noise levels: a constant, so that runs with other seeds are measured alike."""


@dataclass(frozen=True)
class HeldOutClip:
    """An encoded clip on the host; shapes as in `Batch`, without the batch axis.

    Attributes:
        key: its key in the shard.
        latents: normalised.
        text_embeds: of its first caption.
        condition: of i2v-A14B, its first frame given.
    """

    key: str
    latents: Tensor
    text_embeds: Tensor
    condition: Tensor | None

    def batch(self, draw: int, device: torch.device) -> Batch:
        """Return a micro-batch of this clip alone, its randomness keyed by its key and the number of the draw."""
        position = seed_of(int(hashlib.sha256(self.key.encode()).hexdigest()[:15], 16), draw)
        return Batch(
            keys=(self.key,),
            bucket=0,
            positions=(position,),
            latents=self.latents[None].to(device),
            text_embeds=self.text_embeds[None].to(device),
            condition=None if self.condition is None else self.condition[None].to(device),
        )


def encode_held_out(
    dataset: ClipDataset, encoders: Encoders, ranks: Ranks, *, max_clips: int, with_condition: bool
) -> list[tuple[HeldOutClip, bool]]:
    """Return this rank's held-out clips and whether each counts; as many on every rank, filled up where needed.

    The ranks of a sequence group have the same ones: they share each forward pass.

    Args:
        dataset: opened held-out shards; frames come from the middle.
        encoders: VAE and text encoder.
        ranks: this process's place.
        max_clips: at most this many, the first in the order of their keys' hashes.
        with_condition: encode the given first frame.
    """
    places = [
        (hashlib.sha256(clip.key.encode()).hexdigest(), bucket, shard, index)
        for shard, counts in enumerate(dataset.counts)
        for bucket, count in enumerate(counts)
        for index in range(int(count))
        for clip in [dataset.locate(bucket, shard, index, choice=0.5, crop_xy=(0.5, 0.5))]
    ]
    chosen = sorted(places)[:max_clips]
    if not chosen:
        raise DataError(f"{dataset.name}: no held-out clip is in a bucket; see data.sizes and data.num_frames.")

    def encode(place: tuple[str, int, int, int]) -> HeldOutClip:
        _, bucket, shard, index = place
        sample = dataset.load(bucket, shard, index, choice=0.5, crop_xy=(0.5, 0.5))
        frames = sample.frames[None]
        condition = encoders.encode_condition(frames, [False])[0].cpu() if with_condition else None
        text = encoders.encode_prompts([sample.captions[0]])[0].cpu()
        return HeldOutClip(sample.key, encoders.encode_video(frames)[0].cpu(), text, condition)

    mine = [(encode(place), True) for place in chosen[ranks.data_rank :: ranks.data_world_size]]
    per_rank = -(-len(chosen) // ranks.data_world_size)
    if len(mine) < per_rank:  # the other ranks' forward passes wait for this rank's
        mine.append((mine[0][0] if mine else encode(chosen[0]), False))
    return mine


@contextlib.contextmanager
def evaluating(engines: Sequence[Any]) -> Iterator[None]:
    """Turn dropout off inside of the context; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for engine in engines for module in engine.modules()]
    for engine in engines:
        engine.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def strata(sampler: SigmaSampler, count: int) -> Iterator[SigmaSampler]:
    """Yield `count` samplers that cut a sampler's range into parts of equal probability, lowest first."""
    edges = sampler.sigma(torch.linspace(0, 1, count + 1, dtype=torch.float64)).tolist()
    for low, high in itertools.pairwise(edges):
        yield sampler.within(low, high)


class ValidationHook:
    """Every `every` steps, and after the last, the loss on held-out clips; collective."""

    def __init__(
        self,
        clips: Sequence[tuple[HeldOutClip, bool]],
        experts: Sequence[Expert],
        samplers: Sequence[SigmaSampler],
        shares: Sequence[float],
        ranks: Ranks,
        reports: ReportHook,
        *,
        every: int,
        num_steps: int,
        num_sigmas: int,
        averages: Mapping[str, Average],
    ) -> None:
        """Remember what to measure.

        Args:
            clips: this rank's, from `encode_held_out`.
            experts: what is trained.
            samplers: the official noise levels of each expert.
            shares: how much each expert's loss counts in the total.
            ranks: this process's place.
            reports: where results go.
            every: steps between measurements.
            num_steps: steps of the whole run.
            num_sigmas: noise levels per clip and expert.
            averages: averaged weights by component, which are measured too; empty if there are none.
        """
        self._clips, self._experts, self._samplers, self._shares = clips, experts, samplers, shares
        self._ranks, self._reports, self._averages = ranks, reports, averages
        self._every, self._num_steps, self._num_sigmas = every, num_steps, num_sigmas

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Measure when due."""
        if state.step % self._every and state.step != self._num_steps:
            return
        row: dict[str, Any] = {"step": state.step, "epoch": state.epoch}
        row |= self.measure("validation")
        if self._averages:
            with averaged_weights({e.component: e.engine for e in self._experts}, self._averages):
                row |= self.measure("validation_average")
        if self._ranks.is_main:
            self._reports.write(row)

    @torch.no_grad()
    def measure(self, name: str) -> dict[str, dict[str, float | None]]:
        """Return the mean loss, that of each expert and of each decile of sigma, under names that start with `name`."""
        sums = torch.zeros(2, NUM_DECILES + len(self._experts), dtype=torch.float64)
        with evaluating([expert.engine for expert in self._experts]):
            for number, (expert, sampler) in enumerate(zip(self._experts, self._samplers, strict=True)):
                for clip, counts in self._clips:
                    self._add(sums, number, expert, sampler, clip, float(counts))
        sums = sums.to(self._ranks.device)
        torch.distributed.all_reduce(sums)
        total, count = sums.cpu()
        means = [float(t / n) if n else None for t, n in zip(total, count, strict=True)]
        by_expert = dict(zip((expert.name for expert in self._experts), means[NUM_DECILES:], strict=True))
        known = [(share, m) for share, m in zip(self._shares, means[NUM_DECILES:], strict=True) if m is not None]
        loss = sum(share * mean for share, mean in known) / sum(share for share, _ in known) if known else None
        return {name: {"loss": loss, **by_expert}, f"{name}_by_sigma": decile_names(means)}

    def _add(
        self, sums: Tensor, number: int, expert: Expert, sampler: SigmaSampler, clip: HeldOutClip, weight: float
    ) -> None:
        """Add a clip's losses at its noise levels."""
        for draw, stratum in enumerate(strata(sampler, self._num_sigmas)):
            given = expert.objective.i2v_probability
            objective = Objective(stratum, expert.objective.dtype, SEED, i2v_probability=given)
            terms = objective.loss(expert.forward, clip.batch(draw, self._ranks.device))
            loss, sigma = float(terms.sample_losses.item()), float(terms.sigma.item())
            for place in (min(int(sigma * NUM_DECILES), NUM_DECILES - 1), NUM_DECILES + number):
                sums[0, place] += weight * loss
                sums[1, place] += weight
