"""Cases of `gpu.py` with an optimizer: methods, kinds of AdamW, ZeRO-3 on one device, whole steps of users' sizes."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import (
    LATENTS_5B_FULL,
    LATENTS_5B_SMALL,
    LATENTS_14B_SMALL,
    Bench,
    Contestant,
    Latent,
    Row,
    compare,
    free_memory,
    loss_of,
    size_of,
    training_flops,
)

from wan_dist.adapters.lora import LoraSpec, add_lora
from wan_dist.core.errors import ConfigError
from wan_dist.train.blocks import checkpoint_blocks, choose_attention, compile_blocks

MODEL, NUM_BLOCKS = "ti2v-5B", 10
LORA = LoraSpec(rank=32, alpha=32.0, dropout=0.0, targets="blocks", use_rslora=False, use_dora=False)
_LR = 1e-6  # random weights under a large step would soon hold no finite number


class Plain:
    """Bare PyTorch with the arithmetic of our step: fp32 masters of bf16 weights, clipping, fused AdamW."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone().requires_grad_() for p in self.trained]
        self.optimizer = torch.optim.AdamW(self.masters, lr=_LR, fused=True)

    def step(self, loss: torch.Tensor) -> None:
        loss.backward()
        for master, parameter in zip(self.masters, self.trained, strict=True):
            if parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.masters)


def method(bench: Bench) -> list[Row]:
    """A step of adapters against one of all weights, both in bare PyTorch."""
    latent = bench.latent(LATENTS_5B_SMALL)
    layers = bench.fitting_layers(MODEL, latent, state_bytes=24, kept=8, wanted=NUM_BLOCKS)
    sample, contestants = bench.sample(MODEL, latent), {}
    for name in ("full", "LoRA, rank 32"):
        model = bench.model(MODEL, layers)
        if name != "full":
            add_lora(model, LORA, seed=0)
        checkpoint_blocks(model, "block", offload=False)
        flops = training_flops(model.config, latent, all_weights=name == "full")
        contestants[name] = Contestant(_plain_step(Plain(model), sample), flops=flops, note=size_of(model, latent))
    return compare(bench, "method", contestants, "full")


def _plain_step(plain: Plain, sample: Any, **extra: Any) -> Callable[[], None]:
    return lambda: plain.step(loss_of(plain.model, sample, **extra))


def optimizer(bench: Bench) -> list[Row]:
    """AdamW on fp32 masters: fused in one kernel, by lists of tensors, tensor by tensor, with states of 8 bits."""
    layers = bench.fitting_layers(MODEL, (1, 2, 2), state_bytes=36, kept=0, wanted=NUM_BLOCKS)
    model = bench.model(MODEL, layers).float()
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    kinds: dict[str, dict[str, Any]] = {"fused": {"fused": True}, "foreach": {"foreach": True}}
    kinds["one by one"] = {"foreach": False, "fused": False}
    note = f"{sum(p.numel() for p in parameters) / 1e9:.2f} G parameters"
    contestants = {
        f"torch AdamW, {name}": Contestant(torch.optim.AdamW(parameters, lr=_LR, **options).step, note=note)
        for name, options in kinds.items()
    }
    contestants["bitsandbytes AdamW, 8 bits"] = Contestant(_step_of_8_bits(parameters), note=note)
    return compare(bench, "optimizer", contestants, "torch AdamW, foreach")


def _step_of_8_bits(parameters: list[Any]) -> Callable[[], object]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, RuntimeError):
        return _refuse
    return AdamW8bit(parameters, lr=_LR).step


def _refuse() -> None:
    raise ConfigError("bitsandbytes is not here")


def zero(bench: Bench) -> list[Row]:
    """ZeRO-3 over this one device: our step, DeepSpeed alone with our configuration, and bare PyTorch."""
    latent = bench.latent(LATENTS_5B_SMALL)
    layers = bench.fitting_layers(MODEL, latent, state_bytes=42, kept=8, wanted=NUM_BLOCKS)
    sample, peer = bench.sample(MODEL, latent), "bare PyTorch"
    model, partitioned = bench.model(MODEL, layers), bench.model(MODEL, layers)
    for each in (model, partitioned):
        checkpoint_blocks(each, "block", offload=False)
    flops = training_flops(model.config, latent, all_weights=True)
    ours, bare = zero_steps(bench, partitioned, sample)
    contestants = {
        peer: Contestant(_plain_step(Plain(model), sample), flops=flops, note=size_of(model, latent)),
        "bare DeepSpeed, ZeRO-3": Contestant(bare, flops=flops),
        "wan_dist, ZeRO-3": Contestant(ours, flops=flops),
    }
    return compare(bench, "zero", contestants, peer)


def zero_steps(
    bench: Bench, model: Any, sample: Any, i2v: float = 0.0
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return our step and DeepSpeed's own, around one engine that partitions `model`, which is used up.

    Args:
        bench: the device.
        model: on the device, its trained parameters chosen.
        sample: of `Bench.sample`.
        i2v: our share of samples with a given first frame.
    """
    import deepspeed

    from wan_dist.core.flow_matching import SigmaSampler
    from wan_dist.data.batching import Batch
    from wan_dist.parallel import dist
    from wan_dist.parallel.ds_config import deepspeed_config
    from wan_dist.parallel.load import gather_in_blocks
    from wan_dist.train.experts import Expert
    from wan_dist.train.loop import train_step
    from wan_dist.train.objective import Objective

    if not torch.distributed.is_initialized():
        dist.start(dist.ranks_from_environment(), timeout_s=600)
    settings = deepspeed_config(
        micro_batch_size=1,
        world_size=1,
        dtype="bf16" if bench.dtype == torch.bfloat16 else "fp32",
        max_grad_norm=1.0,
        zero_stage=3,
    )
    gather_in_blocks([model.blocks[0]], model)
    # As the trainer does: a first block without an input that needs a gradient would be released too early.
    model.patch_embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))
    trained: Any = [p for p in model.parameters() if p.requires_grad]
    fused = torch.optim.AdamW(trained, lr=_LR, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=fused, model_parameters=trained, config=settings)
    latents, text = sample["target"], sample["text"].float()
    batch = Batch(keys=("x",), bucket=0, positions=(0,), latents=latents, text_embeds=text, condition=None)
    expert = Expert(
        name="transformer",
        component="transformer",
        engine=engine,
        forward=engine,
        context=contextlib.nullcontext,
        loss_scale=1.0,
        objective=Objective(SigmaSampler(shift=5.0), bench.dtype, 0, i2v_probability=i2v),
        lr_at=lambda _: _LR,
    )

    def bare() -> None:
        engine.backward(loss_of(engine, sample))
        engine.step()

    return (lambda: train_step(expert, [batch], lr=_LR)), bare


@dataclasses.dataclass(frozen=True)
class Whole:
    """A training run whose step is measured whole.

    Attributes:
        name: of the case.
        variant: official name.
        latent: of its samples.
        lora: train adapters instead of all weights.
        i2v: samples have a given first frame.
        keep: our `train.gradient_checkpointing`.
        kept: what a block keeps then, in tokens x width bytes.
    """

    name: str
    variant: str
    latent: Latent
    lora: bool
    i2v: bool
    keep: str
    kept: float


def whole_5b_short(bench: Bench) -> list[Row]:
    """A step of 5B at 81 frames of 832x480, nothing recomputed, against diffusers' forward in bare PyTorch."""
    return _whole(bench, Whole("whole_5b_short", MODEL, LATENTS_5B_SMALL, False, False, "none", 79))


def whole_5b_long(bench: Bench) -> list[Row]:
    """A step of 5B at 121 frames of 1280x704, the first one given, against diffusers' forward in bare PyTorch."""
    return _whole(bench, Whole("whole_5b_long", MODEL, LATENTS_5B_FULL, False, True, "attention", 8))


def whole_14b_lora(bench: Bench) -> list[Row]:
    """A step of a LoRA of 14B at 81 frames of 832x480, against diffusers' forward and peft in bare PyTorch."""
    return _whole(bench, Whole("whole_14b_lora", "t2v-A14B", LATENTS_14B_SMALL, True, False, "attention", 8))


def _whole(bench: Bench, run: Whole) -> list[Row]:
    bench = dataclasses.replace(bench, rounds=min(bench.rounds, 2))
    latent = bench.latent(run.latent)
    depth = 40 if run.variant == "t2v-A14B" else 30
    layers = bench.fitting_layers(
        run.variant, latent, state_bytes=4 if run.lora else 20, kept=max(run.kept, 8), wanted=depth
    )
    model, sample = bench.model(run.variant, layers), bench.sample(run.variant, latent)
    if run.lora:
        add_lora(model, LORA, seed=0)
    flops = training_flops(model.config, latent, all_weights=not run.lora)
    case, peer = run.name, "diffusers, flash attention"
    rows = compare(bench, case, _peers(bench, run, model, sample, flops, size_of(model, latent)), peer)
    for parameter in model.parameters():
        parameter.grad = None
    free_memory(bench.device)
    checkpoint_blocks(model, run.keep, offload=False)
    name = f"wan_dist, ZeRO-3, compiled, checkpointing {run.keep}"
    try:
        step, _ = zero_steps(bench, model, sample, i2v=1.0 if run.i2v else 0.0)
    except torch.OutOfMemoryError:
        return [*rows, Row(case, name, peer, note="out of memory")]
    mine = compare(bench, case, {name: Contestant(step, flops=flops)}, name)[0]
    # Beside the others there is no room for our states: their times are of some seconds earlier.
    mine.peer, before = peer, rows[0].seconds
    mine.ratio, mine.above_ratio = mine.seconds / before if mine.seconds and before else None, None
    return [*rows, mine]


def _peers(bench: Bench, run: Whole, model: Any, sample: Any, flops: float, note: str) -> dict[str, Contestant]:
    """Return what others do: checkpointing of blocks, on flash attention, or on cuDNN's with compiled blocks."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = Plain(model)
    timestep = sample["timestep"]
    if run.i2v:  # what diffusers' own forward needs for a given first frame
        tokens = sample["noisy"].shape[2:]
        per_frame = tokens[1] * tokens[2] // 4
        first = torch.zeros(1, device=bench.device)
        timestep = torch.cat([first.expand(1, per_frame), timestep.expand(1, per_frame * (tokens[0] - 1))], dim=1)
    eager = [block.forward for block in model.blocks]
    compile_blocks(model)
    fast = [block.forward for block in model.blocks]

    def prepare(forwards: list[Any], backend: str) -> None:
        for block, forward in zip(model.blocks, forwards, strict=True):
            block.forward = forward
        model.disable_gradient_checkpointing()
        model.enable_gradient_checkpointing()
        choose_attention(model, backend, bench.dtype, bench.device)

    def on_flash() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            plain.step(loss_of(model, sample, timestep=timestep))

    best = "auto" if bench.quick else "cudnn"
    step = _plain_step(plain, sample, timestep=timestep)
    return {
        "diffusers, flash attention": Contestant(on_flash, lambda: prepare(eager, "auto"), flops, note),
        f"diffusers, attention {best}": Contestant(step, lambda: prepare(eager, best), flops),
        f"diffusers, attention {best}, compiled blocks": Contestant(step, lambda: prepare(fast, best), flops),
    }
