"""One rank of a ZeRO-3 job: the loss and full gradients of the first step, for `test_one_step.py`.

Usage: one_step_program.py CONFIG OUT
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from wan_dist.config.load import load_config
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel.environment import prepare_environment


def main(config: str, out: str) -> None:
    prepare_environment()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from wan_dist.parallel import dist
    from wan_dist.train import build

    cfg = load_config(Path(config), [])
    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=60)
    variant = get_variant(cfg.model.variant)
    steps_per_rank = build.accumulation(cfg, ranks)
    batches, _ = build.build_batches(cfg, ranks)
    settings = build.deepspeed_settings(cfg, ranks, steps_per_rank)
    (expert,) = build.build_experts(cfg, variant, settings, ranks)
    engine, objective = expert.engine, expert.objective
    _fill_adapters(engine.module)
    _, micro_batches = next(batches.steps(0, 0))
    losses, positions = [], []
    for number, batch in enumerate(micro_batches):
        if number:
            engine.step()  # counts a micro-step; only the last one would update
        loss = objective.loss(engine, batch).loss
        engine.backward(loss)
        losses.append(float(loss.detach()))
        positions += [(batch.bucket, p) for p in batch.positions]
    result = {"losses": torch.tensor(losses, dtype=torch.float64), "positions": torch.tensor(positions)}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient, weight = safe_get_full_grad(parameter), safe_get_full_fp32_param(parameter)
        assert gradient is not None, name
        assert weight is not None, name
        result[f"grad.{name}"], result[f"weight.{name}"] = gradient.clone(), weight.clone()
    if cfg.method.kind == "full":
        result |= _in_bf16(cfg, variant, ranks, build)
    save_file(result, f"{out}.rank{ranks.rank}.safetensors")
    batches.close()
    dist.barrier()
    dist.stop()


def _fill_adapters(module) -> None:
    """Give the adapters' B numbers: it starts as zero, which would hide them."""
    from deepspeed import zero

    for name, parameter in module.named_parameters():
        if ".lora_B." in name:
            with zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(filled(parameter.shape))


def filled(shape: torch.Size) -> torch.Tensor:
    """Numbers for an adapter's B, the same on every rank and in the test."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1


def _in_bf16(cfg, variant, ranks, build) -> dict[str, torch.Tensor]:
    """What must not be rounded in a bf16 run: the RoPE tables, which `zero.Init` damages, and the fp32 masters."""
    from deepspeed.utils import safe_get_full_fp32_param

    kept = {}
    for stage in (1, 2, 3) if variant.boundary is None else (3,):
        model = cfg.model.model_copy(update={"dtype": "bf16"})
        parallel = cfg.parallel.model_copy(update={"zero_stage": stage})
        bf16 = cfg.model_copy(update={"model": model, "parallel": parallel})
        settings = build.deepspeed_settings(bf16, ranks, build.accumulation(bf16, ranks))
        (expert,) = build.build_experts(bf16, variant, settings, ranks)
        module = expert.engine.module
        kept[f"bf16.{stage}.rope"] = torch.stack([module.rope.freqs_cos, module.rope.freqs_sin]).contiguous()
        for name, parameter in module.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            assert master is not None, name
            kept[f"bf16.{stage}.master.{name}"] = master.clone()
    return kept


if __name__ == "__main__":
    main(sys.argv[-2], sys.argv[-1])
