"""One of two ZeRO ranks: every optimizer of the table, trained, saved and resumed, against whole weights.

Usage: optimizers_program.py FOLDER. Rank 0 writes FOLDER/found.json: per case the largest distance of a weight from
the single-process optimizer's, the largest distance that training moved a weight, and whether a resumed run was equal.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS, SAVED_STEP, BATCH = 6, 3, 8
LR = 0.01
# Name, further arguments, ZeRO stages, which weights decay, the single-process optimizer.
CASES: list[tuple[str, dict[str, Any], tuple[int, ...], str]] = [
    ("adamw", {}, (0, 1, 2, 3), "all"),
    ("adamw", {}, (3,), "matrices"),
    ("adamw_8bit", {"min_8bit_size": 256}, (3,), "all"),
    ("adafactor", {}, (0, 3), "all"),  # 3 is what the configuration refuses
    ("lion", {}, (0, 1, 2, 3), "all"),
    ("prodigy", {"d0": 1e-3, "bias_correction": True}, (0, 1, 2, 3), "all"),
    ("schedule_free", {"r": 0.5}, (0, 1, 2, 3), "all"),
    ("muon", {"adam_lr": 0.003}, (0, 3), "all"),
]


class Net(nn.Module):
    """Matrices inside of blocks, a norm, biases, a table, and sizes that do not divide by two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 24)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)) for _ in range(2)])
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 24))
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x * (1 + self.scale_shift_table))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(BATCH, 7, generator=generator), torch.randn(BATCH, 5, generator=generator)


def reference(name: str, model: Net, extra: dict[str, Any], decay: str) -> torch.optim.Optimizer:
    """The library's optimizer on whole weights, built without our table."""
    import pytorch_optimizer as po

    common: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    everything = list(model.parameters())
    if name in ("adamw", "adamw_8bit"):  # 8 bits are held against all of them
        flat = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("1.weight") or "table" in n]
        rest = [p for p in everything if not any(p is q for q in flat)]
        groups = [{"params": everything}] if decay == "all" else [{"params": rest}, {"params": flat, "weight_decay": 0}]
        return torch.optim.AdamW(groups, **common)
    if name == "adafactor":
        return torch.optim.Adafactor(everything, lr=LR, weight_decay=0.1, **extra)
    if name == "lion":
        return po.Lion(everything, lr=LR, betas=(0.9, 0.99), weight_decay=0.1, **extra)
    if name == "prodigy":
        return po.Prodigy(everything, **{**common, "lr": 1.0}, **extra)
    if name == "schedule_free":
        return po.ScheduleFreeAdamW(everything, **common, **extra)
    from deepspeed.runtime.zero.muon.original_muon import SingleDeviceMuonWithAuxAdam

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks." in n]
    others = [p for p in everything if not any(p is q for q in matrices)]
    adam = {"lr": extra["adam_lr"], "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    return SingleDeviceMuonWithAuxAdam(
        [
            {"params": matrices, "use_muon": True, "lr": LR, "momentum": 0.95, "weight_decay": 0.1},
            {"params": others, "use_muon": False, **adam},
        ]
    )


def settings(name: str, stage: int) -> dict[str, Any]:
    from wan_dist.train.optimizers import zero_settings

    zero = {"stage": stage, "sub_group_size": 300, "stage3_param_persistence_threshold": 0, **zero_settings(name)}
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": BATCH // 2,
        "zero_optimization": zero if stage else {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }


def make_engine(name: str, extra: dict[str, Any], stage: int, decay: str) -> Any:
    import deepspeed

    from wan_dist.train.optimizers import OptimizerOptions, build_optimizer, check_extra

    check_extra(name, extra)
    model = net()
    lr = 1.0 if name == "prodigy" else LR
    options = OptimizerOptions(lr, (0.9, 0.99), 1e-6, 0.1, False, zero_stage=stage, decay=decay, extra=extra)
    optimizer = build_optimizer(name, model.named_parameters(), options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(name, stage))
    return engine


def train(engine: Any, rank: int, first: int, last: int) -> None:
    for step in range(first, last):
        x, y = batch(step)
        mine = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        engine.backward(torch.nn.functional.mse_loss(engine(x[mine]), y[mine]))
        engine.step()


def weights(engine: Any, stage: int) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    found: list[Any] = [safe_get_full_fp32_param(p) if stage else p.detach() for p in engine.module.parameters()]
    return torch.cat([tensor.flatten().clone() for tensor in found])


def whole(name: str, extra: dict[str, Any], decay: str) -> tuple[Tensor, Tensor]:
    """Weights before and after the same steps of one process on the whole batch."""
    model = net()
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = reference(name, model, extra, decay)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return start, torch.cat([p.detach().flatten() for p in model.parameters()])


def main(folder: Path) -> None:
    # Muon's functions are compiled otherwise, which takes a minute and a compiler.
    torch._dynamo.config.disable = True
    from wan_dist.parallel import dist

    torch.set_num_threads(1)
    ranks = dist.ranks_from_environment()
    dist.start(ranks, timeout_s=120)
    found = {}
    for name, extra, stages, decay in CASES:
        start, expected = whole(name, extra, decay)
        for stage in stages:
            key = f"{name}-{stage}-{decay}"
            engine = make_engine(name, extra, stage, decay)
            train(engine, ranks.rank, 0, SAVED_STEP)
            engine.save_checkpoint(str(folder / key), tag="t", save_latest=False)
            train(engine, ranks.rank, SAVED_STEP, STEPS)
            got = weights(engine, stage)
            resumed = make_engine(name, extra, stage, decay)
            resumed.load_checkpoint(str(folder / key), tag="t")
            train(resumed, ranks.rank, SAVED_STEP, STEPS)
            found[key] = {
                "distance": float((got - expected).abs().max()),
                "moved": float((expected - start).abs().max()),
                "resumed": bool(torch.equal(got, weights(resumed, stage))),
                "num_groups": len(getattr(engine.optimizer, "fp16_groups", [])),
            }
            engine.destroy()
            resumed.destroy()
    if ranks.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.stop()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
