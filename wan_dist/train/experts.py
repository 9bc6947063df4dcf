"""The noise ranges that a run trains, and which one each step is for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import TrainingError
from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.core.order import Block
from wan_dist.core.rng import uniform
from wan_dist.models.wan.variants import WanVariant
from wan_dist.train.blocks import Context
from wan_dist.train.objective import Objective


@dataclass(frozen=True)
class Expert:
    """One noise range and what learns it.

    Attributes:
        name: `high_noise` or `low_noise`; `transformer` where there is one.
        component: name of what the engine trains, in checkpoints.
        engine: DeepSpeed engine that steps it.
        forward: what the objective calls to predict: the engine, or a view of it.
        context: entered around one forward and backward.
        loss_scale: what the loss is multiplied by for the backward pass, so that DeepSpeed's mean over all ranks is the
            mean over those that see different samples.
        objective: flow matching on this noise range.
        lr_at: learning rate of a step of the run.
    """

    name: str
    component: str
    engine: Any
    forward: Callable[..., Any]
    context: Context
    loss_scale: float
    objective: Objective
    lr_at: Callable[[int], float]


def sigma_range(variant: WanVariant, expert: str) -> tuple[float, float]:
    """Return the noise levels that an expert is for; the two meet at the boundary, in t-space, after the shift.

    Source: `wan/text2video.py` of the official repository, `t >= boundary * 1000`.
    """
    if variant.boundary is None:
        return 0.0, 1.0
    return (variant.boundary, 1.0) if expert == "high_noise" else (0.0, variant.boundary)


@dataclass(frozen=True)
class ExpertDraw:
    """Draws the expert of each step so that both together see the untruncated distribution of sigma.

    A step is for the high-noise expert with the probability that a sigma falls into its range; each of the step's
    samples is then drawn from the distribution truncated to that range.

    Attributes:
        names: experts of the run; one alone gets every step.
        sampler: distribution of sigma over both ranges.
        boundary: sigma at and above which the high-noise expert predicts; None for one transformer.
        bucket_tokens: transformer tokens of a video of each bucket, on which the flow shift may depend.
        seed: the run's seed.
    """

    names: tuple[str, ...]
    sampler: SigmaSampler
    boundary: float | None
    bucket_tokens: tuple[int, ...]
    seed: int

    def index(self, block: Block) -> int:
        """Return which expert trains on a block: the same on every rank and after a resume."""
        if len(self.names) == 1 or self.boundary is None:
            return 0
        quantile = uniform(self.seed, "expert", block.epoch, block.block)
        return self.names.index(self._of_bucket(block.bucket).expert_of(quantile, self.boundary))

    def high_noise_share(self, bucket: int) -> float:
        """Return the share of a bucket's steps that are for the high-noise expert."""
        return self._of_bucket(bucket).probability_above(self.boundary or 0.0)

    def _of_bucket(self, bucket: int) -> SigmaSampler:
        return self.sampler.for_tokens(self.bucket_tokens[bucket])


def check_agreement(lowest: float, highest: float) -> None:
    """Return if all ranks drew the same expert; two would be mixed without an error from DeepSpeed.

    Args:
        lowest: smallest index over the ranks.
        highest: largest index over the ranks.
    Raises:
        TrainingError: they differ.
    """
    if lowest != highest:
        raise TrainingError(
            f"the ranks drew experts {lowest:.0f} and {highest:.0f} for one step; give them the same config and data."
        )


def expert_names(cfg: TrainConfig, variant: WanVariant) -> tuple[str, ...]:
    """Return the names of the experts that a run trains, in the variant's order; `transformer` for ti2v-5B."""
    return variant.experts if cfg.model.expert in (None, "both") else (cfg.model.expert,)
