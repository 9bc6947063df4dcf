"""What the cases of `gpu.py` share: sizes, models of real width, timing, rows."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from wan_dist.core.errors import WanDistError
from wan_dist.models.wan.flops import block_flops
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.transformer import empty_transformer
from wan_dist.models.wan.variants import get_variant, latent_tokens

Latent = tuple[int, int, int]
# Frames, height and width in latents: 81 frames of 832x480 px and 121 of 1280x704 for 5B, 81 of 832x480 for 14B.
LATENTS_5B_SMALL: Latent = (21, 30, 52)
LATENTS_5B_FULL: Latent = (31, 44, 80)
LATENTS_14B_SMALL: Latent = (21, 60, 104)
LATENTS_QUICK: Latent = (3, 4, 6)
_LEFT_OF_DEVICE = 0.88  # of the free memory; the rest is for gather buckets, workspaces and fragmentation


@dataclass(frozen=True)
class Bench:
    """Where and how large everything is measured.

    Attributes:
        device: an accelerator, or the CPU for `quick`.
        quick: tiny sizes, to see that it runs; the numbers say nothing.
        dtype: compute dtype.
        peak_tflops: of the device in bf16; None leaves MFU out.
        rounds: timed rounds after one that does not count.
    """

    device: torch.device
    quick: bool
    dtype: torch.dtype
    peak_tflops: float | None
    rounds: int

    def latent(self, real: Latent) -> Latent:
        """Return the latents' frames, height and width: the real ones, or tiny ones."""
        return LATENTS_QUICK if self.quick else real

    def config(self, variant: str, num_layers: int) -> dict[str, Any]:
        """Return a transformer's configuration: the variant's own but for the number of its blocks."""
        spec = get_variant(variant)
        heads, width, ffn, text = spec.num_heads, 128, spec.ffn_width, 4096
        if self.quick:
            heads, width, ffn, text = 4, 24, 128, 64
        return {
            "patch_size": list(spec.patch_size),
            "num_attention_heads": heads,
            "attention_head_dim": width,
            "in_channels": spec.in_channels,
            "out_channels": spec.out_channels,
            "text_dim": text,
            "freq_dim": 256,
            "ffn_dim": ffn,
            "num_layers": num_layers,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        }

    def fitting_layers(self, variant: str, latent: Latent, *, state_bytes: float, kept: float, wanted: int) -> int:
        """Return how many blocks fit into the memory that is free, `wanted` at most.

        Args:
            variant: whose width.
            latent: latents of a sample.
            state_bytes: per parameter: weights, gradients, optimizer states.
            kept: activations kept per block, in units of tokens x width bytes.
            wanted: number of blocks that the case asks for.
        """
        if self.quick:
            return 2
        if self.device.type != "cuda":
            return wanted
        spec = get_variant(variant)
        width, tokens = spec.width, latent_tokens(latent)
        parameters = 8 * width**2 + 2 * width * spec.ffn_width
        block_bytes = parameters * state_bytes + kept * tokens * width
        free_bytes = torch.cuda.mem_get_info(self.device)[0] * _LEFT_OF_DEVICE
        one_block_at_work = 110 * tokens * width
        fitting = int((free_bytes - one_block_at_work - 2e9) / block_bytes)
        return max(min(fitting, wanted), 1)

    def model(self, variant: str, num_layers: int) -> Any:
        """Return a transformer of random weights on the device, in the compute dtype, ready to train."""
        with torch.device(self.device):
            model: Any = empty_transformer(self.config(variant, num_layers))
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.data = torch.empty_like(parameter, dtype=self.dtype)  # of parameters only: RoPE stays exact
                if "norm" in name and parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)
        return model.train()

    def sample(self, variant: str, latent: Latent) -> dict[str, Tensor]:
        """Return one sample: noisy latents, a target, text embeddings, a timestep."""
        spec, generator = get_variant(variant), torch.Generator(self.device).manual_seed(1)
        text_width = self.config(variant, 1)["text_dim"]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        return {
            "noisy": normal(1, spec.in_channels, *latent).to(self.dtype),
            "target": normal(1, spec.out_channels, *latent),
            "text": normal(1, 512, text_width).to(self.dtype),
            "timestep": torch.full((1,), 700.0, device=self.device),
        }

    def use(self, flops: float, seconds: float) -> float | None:
        """Return the share of the device's peak."""
        return None if self.peak_tflops is None else flops / seconds / (self.peak_tflops * 1e12)


def training_flops(config: Mapping[str, Any], latent: Latent, *, all_weights: bool) -> float:
    """Return the operations that a training step of one sample needs, recomputation not counted."""
    return block_flops(config, latent_tokens(latent)).training(all_weights=all_weights)


def loss_of(model: Any, sample: Mapping[str, Tensor], **extra: Any) -> Tensor:
    """Return the mean squared error of a model's prediction."""
    predicted = predict_velocity(
        model, sample["noisy"], extra.pop("timestep", sample["timestep"]), sample["text"], None, **extra
    )
    return torch.nn.functional.mse_loss(predicted.float(), sample["target"])


def size_of(model: Any, latent: Latent) -> str:
    """Return how large a measured model is."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    return f"{config.num_layers} blocks of width {width}, {latent_tokens(latent)} tokens"


@dataclass(frozen=True)
class Contestant:
    """One way to do a case's work.

    Attributes:
        work: what is timed.
        prepare: what comes before each time and is not timed.
        flops: operations that the work needs, for MFU; None where that says nothing.
        note: what to say beside the numbers.
    """

    work: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    flops: float | None = None
    note: str = ""


@dataclass
class Row:
    """What one contestant of a case took.

    Attributes:
        case: name of the case.
        contestant: what was measured.
        peer: what the ratios compare it with.
        seconds: median.
        ratio: of the peer's time; median of the ratios within each round.
        peak_gib: device memory allocated at most; None on a CPU.
        above_ratio: of the peer's memory, each above what lay there before.
        mfu: share of the stated peak.
        note: setting, or why there is no number.
    """

    case: str
    contestant: str
    peer: str
    seconds: float | None = None
    ratio: float | None = None
    peak_gib: float | None = None
    above_ratio: float | None = None
    mfu: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Measured:
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    above: list[float] = field(default_factory=list)
    problem: str = ""


def compare(bench: Bench, case: str, contestants: Mapping[str, Contestant], peer: str) -> list[Row]:
    """Return a row for each contestant, measured in turn; one that fails for want of memory or a library says so."""
    measured = {name: _Measured() for name in contestants}
    for number in range(bench.rounds + 1):
        for name, contestant in contestants.items():
            if not measured[name].problem:
                _once(bench, contestant, measured[name], counts=number > 0)
    return [_row(bench, case, name, contestants[name], measured, peer) for name in contestants]


def _once(bench: Bench, contestant: Contestant, into: _Measured, *, counts: bool) -> None:
    try:
        contestant.prepare()
        seconds, peak, above = _timed(bench.device, contestant.work)
    except torch.OutOfMemoryError:
        into.problem = "out of memory"
        free_memory(bench.device)
    except WanDistError as error:
        into.problem = str(error)
    else:
        if counts:
            into.seconds.append(seconds)
            into.peaks.append(peak)
            into.above.append(above)


def _timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float, float]:
    """Return seconds, the peak of allocated memory in GiB, and how far that was above the start."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started, 0.0, 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before, started = torch.cuda.memory_allocated(device), time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated(device)
    return seconds, peak / 2**30, (peak - before) / 2**30


def _row(
    bench: Bench, case: str, name: str, contestant: Contestant, measured: Mapping[str, _Measured], peer: str
) -> Row:
    mine, other = measured[name], measured[peer]
    if mine.problem or not mine.seconds:
        return Row(case, name, peer, note=mine.problem or "no number")
    seconds = statistics.median(mine.seconds)
    row = Row(case, name, peer, seconds, note=contestant.note)
    if bench.device.type == "cuda":
        row.peak_gib = max(mine.peaks)
    if contestant.flops is not None:
        row.mfu = bench.use(contestant.flops, seconds)
    if other.seconds and not other.problem:
        row.ratio = statistics.median(a / b for a, b in zip(mine.seconds, other.seconds, strict=True))
        if min(other.above) > 0:
            row.above_ratio = max(mine.above) / max(other.above)
    return row


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
