"""From the flow section of a configuration to the distribution of noise levels."""

from wan_dist.config.schema import FlowConfig
from wan_dist.core.flow_matching import ResolutionShift, SigmaSampler
from wan_dist.models.wan.variants import WanVariant


def sigma_sampler(flow: FlowConfig, variant: WanVariant) -> SigmaSampler:
    """Return the distribution of sigma over [t_min, t_max], both experts together.

    One expert's is `.within(boundary, 1)` or `.within(0, boundary)` of it.
    """
    return SigmaSampler(
        shift=_shift(flow, variant),
        sampling=flow.sampling,
        logit_mean=flow.logit_mean,
        logit_std=flow.logit_std,
        sigmoid_scale=flow.sigmoid_scale,
        mode_scale=flow.mode_scale,
        beta_alpha=flow.beta_alpha,
        beta_beta=flow.beta_beta,
        sigma_min=flow.t_min,
        sigma_max=flow.t_max,
    )


def _shift(flow: FlowConfig, variant: WanVariant) -> float | ResolutionShift:
    if flow.shift == "auto":
        return variant.flow_shift
    if flow.shift == "resolution":
        official = (variant.num_tokens(variant.num_frames, *variant.sizes_px[0]), variant.flow_shift)
        return ResolutionShift(flow.shift_rule, tuple(flow.shift_points or [official]))
    return flow.shift
