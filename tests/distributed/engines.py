"""Small DeepSpeed engines for tests of what lies on the disk: ranks forked by `fork_ranks` in a program of their own.

The parameters are chosen to cut badly: sizes that no number of ranks divides, one smaller than the number of ranks, a
frozen layer, LoRA names, two parameter groups with hyperparameters of their own.
"""

import contextlib
import datetime
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Odd(nn.Module):
    """A few layers that cut badly; computes something that every trained parameter takes part in."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.base = nn.Linear(13, 13)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(13, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 13, bias=False)})
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(13, 5)
        self.offset: Tensor
        self.register_buffer("offset", torch.arange(13.0) / 100)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) + self.offset.to(x.dtype)
        x = self.base(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scale
        return self.last(torch.tanh(x)).float().square().mean()


def settings(stage: int, *, dtype: str = "bf16", sub_group: int = 60, offload: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1000}
    if stage == 3:
        zero |= {"sub_group_size": sub_group, "stage3_param_persistence_threshold": 5}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"tag_validation": "Fail"},
        "steps_per_print": 10**9,
    }
    if stage or dtype == "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def build(config: dict[str, Any], *, seed: int, frozen: bool, optimizer: str = "adamw", groups: int = 2) -> Any:
    """Return an engine; `frozen` leaves `base` untrained."""
    import deepspeed

    torch.manual_seed(seed)
    if config["zero_optimization"]["stage"] == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Odd()
        # zero.Init builds buffers in the compute dtype; they are no part of what is tested.
    else:
        model = Odd()
    if frozen:
        model.base.requires_grad_(False)
    decayed = [p for n, p in model.named_parameters() if p.requires_grad and (groups == 1 or not n.endswith("bias"))]
    others = [p for n, p in model.named_parameters() if p.requires_grad and groups == 2 and n.endswith("bias")]
    parts = [{"params": decayed, "lr": 1e-2, "weight_decay": 0.1}]
    if others:
        parts.append({"params": others, "lr": 3e-3, "weight_decay": 0.0})
    kind: Any = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "factored": Factored}[optimizer]
    engine, *_ = deepspeed.initialize(model=model, optimizer=kind(parts), config=config)
    return engine


class Factored(torch.optim.SGD):
    """An optimizer whose state does not go element by element."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = torch.full((2,), float(p.numel()))


def train(engine: Any, steps: Sequence[int]) -> list[float]:
    """Train on the same samples whatever the number of ranks; return the losses."""
    losses = []
    for step in steps:
        x = torch.randn(2, 7, generator=torch.Generator().manual_seed(step))
        x = x.to(next(engine.module.parameters()).dtype)
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def full_state(engine: Any) -> dict[str, Tensor]:
    """Return every trained parameter's fp32 master and, where there are any, Adam's moments; collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    state: dict[str, Tensor] = {}
    stage = engine.zero_optimization_stage()
    for number, moments in enumerate(engine.optimizer.state.values()):
        if "step" in moments:
            state[f"step|{number}" if stage == 0 else "step"] = (
                torch.as_tensor(moments["step"]).clone().float().reshape(1)
            )
    if stage in (1, 2):
        return state | _joined_state(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 0:
            moments = engine.optimizer.state.get(parameter, {})
            state[name] = parameter.detach().float().clone()
            state |= {f"{name}|{key}": moments[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in moments}
            continue
        master = safe_get_full_fp32_param(parameter)
        assert master is not None, name
        state[name] = master.detach().clone().reshape(-1)
        for key in ("exp_avg", "exp_avg_sq"):
            moment = None
            with contextlib.suppress(KeyError):  # an optimizer without moments
                moment = safe_get_full_optimizer_state(parameter, key)
            if moment is not None:
                state[f"{name}|{key}"] = moment.detach().clone().reshape(-1)
    return {name: value.reshape(-1) for name, value in state.items()}


def _joined_state(engine: Any) -> dict[str, Tensor]:
    """Join the ranks' partitions of ZeRO-1 and 2, which DeepSpeed's helpers read only after another step."""
    optimizer = engine.optimizer
    whole = hasattr(optimizer, "round_robin_bit16_groups")
    groups = optimizer.round_robin_bit16_groups if whole else optimizer.bf16_groups
    masters = optimizer.single_partition_of_fp32_groups if whole else optimizer.fp32_groups_flat_partition
    state: dict[str, Tensor] = {}
    for group, master in zip(groups, masters, strict=True):
        held = {"": master, **{f"|{k}": v for k, v in optimizer.state[master].items() if k.startswith("exp_avg")}}
        for suffix, flat in held.items():
            parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, flat.detach())
            joined, offset = torch.cat(parts), 0
            for parameter in group:
                name = engine.param_names[parameter] + suffix
                state[name] = joined[offset : offset + parameter.numel()].clone()
                offset += parameter.numel()
    return state


def start() -> tuple[int, int]:
    """Connect the ranks of a test program; return rank and their number."""
    from wan_dist.parallel.environment import prepare_environment

    prepare_environment()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(seconds=60), verbose=False)
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def fork_ranks(num_ranks: int, work: Callable[[int], None], store: Path, logs: str) -> list[int]:
    """Fork the ranks of a job, each of which runs `work` with its number, and return their process ids.

    Everything is imported by now, so that a job costs about a second instead of ten.

    Args:
        num_ranks: how many.
        work: what a rank does.
        store: file through which they meet; must not be there.
        logs: path of their logs, to which `.rank-0.log` and so on is added.
    """
    pids = []
    for rank in range(num_ranks):
        pid = os.fork()
        if not pid:
            _be_rank(rank, num_ranks, work, store, Path(f"{logs}.rank-{rank}.log"))
        pids.append(pid)
    return pids


def _be_rank(rank: int, num_ranks: int, work: Callable[[int], None], store: Path, log: Path) -> None:
    code = 1
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in numbers.items()})
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        start()
        work(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
