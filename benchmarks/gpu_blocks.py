"""Cases of `gpu.py` without an optimizer: the device's own limits, and forward and backward in several ways."""

from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import (
    LATENTS_5B_FULL,
    LATENTS_5B_SMALL,
    Bench,
    Contestant,
    Row,
    compare,
    loss_of,
    size_of,
    training_flops,
)

from wan_dist.train.blocks import ATTENTION_BACKENDS, checkpoint_blocks, choose_attention, compile_blocks

MODEL = "ti2v-5B"
NUM_BLOCKS = 10  # of 30: they are alike, and a case must leave room and time for the others
_CHECKPOINTED, _EAGER = 4.0, 79.0  # bytes per token and channel that a block keeps; counted with saved-tensor hooks


def floor(bench: Bench) -> list[Row]:
    """Matrix products, attention and copies at the model's shapes: what the device itself can do."""
    width, inner, tokens, heads = (3072, 14336, 8190, 24) if not bench.quick else (96, 128, 18, 4)
    x = torch.randn(tokens, width, device=bench.device, dtype=bench.dtype)
    narrow, wide = (torch.randn(n, width, device=bench.device, dtype=bench.dtype) for n in (width, inner))
    block = torch.empty(2**28 if not bench.quick else 2**10, device=bench.device, dtype=bench.dtype)
    copy = torch.empty_like(block)
    contestants = {
        "product of tokens x width x width": Contestant(lambda: x @ narrow.T, flops=2.0 * tokens * width**2),
        "product of tokens x width x ffn": Contestant(lambda: x @ wide.T, flops=2.0 * tokens * width * inner),
        "copy of 0.5 GiB": Contestant(lambda: copy.copy_(block), note=f"{2 * block.nbytes} bytes moved"),
    }
    for name, backend in _sdpa_backends().items():
        work = _attention(bench, tokens, heads, width // heads, backend)
        # Forward 4 L^2 d, backward twice that, by the convention that MFU goes by.
        contestants[f"attention forward and backward, {name}"] = Contestant(work, flops=12.0 * tokens**2 * width)
    rows = compare(bench, "floor", contestants, "product of tokens x width x width")
    for row in rows:
        row.ratio = row.above_ratio = None
    return rows


def _sdpa_backends() -> dict[str, Any]:
    from torch.nn.attention import SDPBackend

    return {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


def _attention(bench: Bench, tokens: int, heads: int, width: int, backend: Any) -> Callable[[], object]:
    from torch.nn.attention import sdpa_kernel

    from wan_dist.core.errors import ConfigError

    query = torch.randn(1, heads, tokens, width, device=bench.device, dtype=bench.dtype, requires_grad=True)
    upstream = torch.randn_like(query)

    def work() -> None:
        try:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(query, query, query).backward(upstream)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ConfigError(f"not available here ({str(error).splitlines()[0]})") from None
        query.grad = None

    return work


def compact(bench: Bench) -> list[Row]:
    """Image-to-video of ti2v-5B: two timesteps per sample against diffusers' timestep per token."""
    latent = bench.latent(LATENTS_5B_FULL)
    layers = bench.fitting_layers(MODEL, latent, state_bytes=4, kept=_CHECKPOINTED, wanted=NUM_BLOCKS)
    model, sample = bench.model(MODEL, layers), bench.sample(MODEL, latent)
    checkpoint_blocks(model, "block", offload=False)
    first, rest = torch.zeros(1, device=bench.device), sample["timestep"]
    per_frame = latent[1] * latent[2] // 4
    per_token = torch.cat([first.expand(1, per_frame), rest.expand(1, per_frame * (latent[0] - 1))], dim=1)
    flops = training_flops(model.config, latent, all_weights=True)
    peer = "diffusers, a timestep per token"
    contestants = {
        peer: Contestant(_step(model, sample, timestep=per_token), flops=flops, note=size_of(model, latent)),
        "wan_dist, two timesteps": Contestant(_step(model, sample, first_timestep=first), flops=flops),
        "text-to-video, one timestep": Contestant(_step(model, sample), flops=flops),
    }
    return compare(bench, "compact", contestants, peer)


def checkpointing(bench: Bench) -> list[Row]:
    """What blocks keep for the backward pass, and where."""
    latent = bench.latent(LATENTS_5B_SMALL)
    layers = bench.fitting_layers(MODEL, latent, state_bytes=4, kept=_EAGER, wanted=NUM_BLOCKS)
    model, sample = bench.model(MODEL, layers), bench.sample(MODEL, latent)
    flops = training_flops(model.config, latent, all_weights=True)
    contexts: dict[str, Any] = {}

    def contestant(mode: str, offload: bool, note: str = "") -> Contestant:
        def prepare() -> None:
            model.disable_gradient_checkpointing()
            contexts["now"] = checkpoint_blocks(model, mode, offload=offload)

        def work() -> None:
            with contexts["now"]():
                loss_of(model, sample).backward()
            model.zero_grad()

        return Contestant(work, prepare, flops, note)

    def diffusers_own() -> None:
        model.disable_gradient_checkpointing()
        model.enable_gradient_checkpointing()

    peer = "diffusers' checkpointing"
    contestants = {
        peer: Contestant(_step(model, sample), diffusers_own, flops, size_of(model, latent)),
        "none": contestant("none", False),
        "block": contestant("block", False),
        "attention": contestant("attention", False),
        "block, inputs offloaded": contestant("block", True),
        "attention, inputs offloaded": contestant("attention", True),
    }
    return compare(bench, "checkpointing", contestants, peer)


def attention(bench: Bench) -> list[Row]:
    """The kernels that `train.attention` offers."""
    latent = bench.latent(LATENTS_5B_FULL)
    layers = bench.fitting_layers(MODEL, latent, state_bytes=4, kept=_CHECKPOINTED, wanted=NUM_BLOCKS)
    model, sample = bench.model(MODEL, layers), bench.sample(MODEL, latent)
    checkpoint_blocks(model, "attention", offload=False)
    flops = training_flops(model.config, latent, all_weights=True)

    def contestant(backend: str) -> Contestant:
        def prepare() -> None:
            choose_attention(model, backend, bench.dtype, bench.device)

        return Contestant(_step(model, sample), prepare, flops, size_of(model, latent) if backend == "auto" else "")

    return compare(bench, "attention", {name: contestant(name) for name in ATTENTION_BACKENDS}, "auto")


def compiled(bench: Bench) -> list[Row]:
    """Compiled blocks against eager ones, under both kinds of checkpointing."""
    latent = bench.latent(LATENTS_5B_SMALL)
    layers = bench.fitting_layers(MODEL, latent, state_bytes=4, kept=_CHECKPOINTED, wanted=NUM_BLOCKS)
    model, sample = bench.model(MODEL, layers), bench.sample(MODEL, latent)
    flops = training_flops(model.config, latent, all_weights=True)
    eager = [block.forward for block in model.blocks]
    compile_blocks(model)
    fast = [block.forward for block in model.blocks]

    def contestant(forwards: list[Any], mode: str, note: str = "") -> Contestant:
        def prepare() -> None:
            for block, forward in zip(model.blocks, forwards, strict=True):
                block.forward = forward
            checkpoint_blocks(model, mode, offload=False)

        return Contestant(_step(model, sample), prepare, flops, note)

    peer = "eager, block"
    contestants = {
        peer: contestant(eager, "block", size_of(model, latent)),
        "compiled, block": contestant(fast, "block"),
        "eager, attention": contestant(eager, "attention"),
        "compiled, attention": contestant(fast, "attention"),
    }
    return compare(bench, "compile", contestants, peer)


def _step(model: Any, sample: Any, **extra: Any) -> Callable[[], None]:
    def work() -> None:
        loss_of(model, sample, **extra).backward()
        model.zero_grad()

    return work
