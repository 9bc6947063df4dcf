"""wan_dist's training step against bare DeepSpeed with the same configuration, and ZeRO-3 against a bare PyTorch loop.

Two ranks (one where there is one accelerator), all contestants in the same processes, in turn, on the same batch.
"""

import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import hardware, versions


def run(quick: bool) -> None:
    """Start the ranks; rank 0 prints the table."""
    print(f"{hardware()}; {versions('torch', 'deepspeed', 'diffusers')}", flush=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, str(Path(__file__)), *(["--quick"] if quick else [])], check=True)


def _rank(quick: bool) -> None:
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    from wan_dist.parallel import dist

    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=600)
    contestants = _contestants(ranks, quick)
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(3 if quick else 31):
        for name, work in contestants.items():
            dist.barrier()
            started = time.perf_counter()
            work()
            elapsed = dist.max_over_ranks(time.perf_counter() - started, ranks)
            if number:
                spent[name].append(elapsed)
    if ranks.is_main:
        bare, plain = spent["bare DeepSpeed, ZeRO-3"], spent["bare PyTorch, a whole model per rank"]
        print("| contestant | s per step, median | of bare DeepSpeed | of bare PyTorch |\n|---|---|---|---|")
        for name, seconds in spent.items():
            ratios = [statistics.median(a / b for a, b in zip(seconds, other, strict=True)) for other in (bare, plain)]
            print(f"| {name} | {statistics.median(seconds):.3f} | {ratios[0]:.3f}x | {ratios[1]:.2f}x |", flush=True)
    dist.barrier()
    dist.stop()


def _contestants(ranks: Any, quick: bool) -> dict[str, Callable[[], object]]:
    import contextlib

    import deepspeed
    import torch

    from wan_dist.core.flow_matching import SigmaSampler
    from wan_dist.data.batching import Batch
    from wan_dist.models.wan.build import build_transformer
    from wan_dist.models.wan.forward import predict_velocity
    from wan_dist.models.wan.variants import get_variant
    from wan_dist.parallel.ds_config import deepspeed_config
    from wan_dist.parallel.load import gather_in_blocks
    from wan_dist.train.blocks import compile_blocks
    from wan_dist.train.experts import Expert
    from wan_dist.train.loop import train_step
    from wan_dist.train.objective import Objective

    torch.manual_seed(0)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    settings = deepspeed_config(
        micro_batch_size=1,
        world_size=ranks.world_size,
        dtype="bf16" if dtype == torch.bfloat16 else "fp32",
        max_grad_norm=1.0,
        zero_stage=3,
    )
    whole: Any = build_transformer(get_variant("ti2v-5B")).to(ranks.device, dtype)
    whole.enable_gradient_checkpointing()

    def partitioned(*, compiled: bool) -> Any:
        model = copy.deepcopy(whole)
        gather_in_blocks([model.blocks[0]], model)
        if compiled:
            compile_blocks(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    engine, compiled = partitioned(compiled=False), partitioned(compiled=True)
    plain = torch.optim.AdamW(whole.parameters(), lr=1e-5, fused=True)
    side = 8 if quick else 24
    latents = torch.randn(1, 48, 9, side, side, device=ranks.device)
    text = torch.randn(1, 512, whole.config.text_dim, device=ranks.device)
    batch = Batch(keys=("x",), bucket=0, positions=(ranks.rank,), latents=latents, text_embeds=text, condition=None)
    objective = Objective(SigmaSampler(shift=5.0), dtype, 0)

    def expert(engine: Any) -> Expert:
        return Expert(
            name="transformer",
            component="transformer",
            engine=engine,
            forward=engine,
            context=contextlib.nullcontext,
            loss_scale=1.0,
            objective=objective,
            lr_at=lambda _: 1e-5,
        )

    def loss_of(model: Any) -> torch.Tensor:
        noise, sigma = torch.randn_like(latents), torch.rand(1, device=ranks.device)
        noisy = (1 - sigma) * latents + sigma * noise
        predicted = predict_velocity(model, noisy.to(dtype), 1000 * sigma, text.to(dtype), None)
        return torch.nn.functional.mse_loss(predicted.float(), noise - latents)

    def bare_deepspeed() -> None:
        engine.backward(loss_of(engine))
        engine.step()

    def bare_pytorch() -> None:
        loss_of(whole).backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        plain.step()
        plain.zero_grad(set_to_none=True)

    return {
        "wan_dist, ZeRO-3": lambda: train_step(expert(engine), [batch], lr=1e-5),
        "wan_dist, ZeRO-3, compiled blocks": lambda: train_step(expert(compiled), [batch], lr=1e-5),
        "bare DeepSpeed, ZeRO-3": bare_deepspeed,
        "bare PyTorch, a whole model per rank": bare_pytorch,
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _rank("--quick" in sys.argv)
