"""Prodigy on partitioned weights: its estimate of the distance to the solution is one number for all ranks."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ShardedProdigy(torch.optim.Optimizer):
    """Adam whose step size follows an estimated distance d, the same on every rank.

    A library's Prodigy on a ZeRO partition would estimate another d on every rank, from its own shard alone, and the
    ranks' weights would drift apart in scale. Here the two sums behind d are added up over the ranks; everything else
    is element-wise. The numbers are those of `pytorch_optimizer.Prodigy` on the whole weights.

    It steps one group of parameters at a time and once per training step, since d belongs to all of them together.
    Source: arXiv:2306.06101, algorithm 4.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta3: float | None = None,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
        add_over_ranks: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            params: one group.
            lr: multiplies d; 1 is meant.
            betas: decay rates of the moments.
            eps: added to the root of the second moment, times d.
            weight_decay: decoupled weight decay.
            beta3: decay rate of the sums behind d; None is sqrt(betas[1]).
            d0: first estimate.
            d_coef: multiplies the estimate.
            growth_rate: most that d grows by in a step.
            bias_correction: correct the moments as Adam does.
            safeguard_warmup: leave the learning rate out of the denominator.
            add_over_ranks: adds a tensor up over the ranks in place; None where every rank has all weights.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "beta3": math.sqrt(betas[1]) if beta3 is None else beta3,
            "d0": d0,
            "d": d0,
            "d_max": d0,
            "d_numerator": 0.0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
            "bias_correction": bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "num_steps": 0,
        }
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ValueError("Prodigy's distance is one number: give one parameter group")
        self._add_over_ranks = add_over_ranks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step all parameters; collective."""
        if closure is not None:
            raise ValueError("no closures")
        [group] = self.param_groups
        group["num_steps"] += 1
        d, d0 = group["d"], group["d0"]
        rate = d * group["lr"] * _correction(group)
        sums = self._accumulate(group, rate)
        numerator = group["beta3"] * group["d_numerator"] + float(sums[0])
        denominator = float(sums[1])
        group["d_numerator"] = numerator
        if denominator == 0.0:
            return  # no gradient yet
        estimate = group["d_coef"] * numerator / denominator
        d = max(d, estimate) if d == d0 else d
        group["d_max"] = max(group["d_max"], estimate)
        group["d"] = d = min(group["d_max"], d * group["growth_rate"])
        for p in group["params"]:
            if p.grad is not None:
                state = self.state[p]
                p.mul_(1.0 - rate * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(d * group["eps"]), value=-rate)

    def _accumulate(self, group: dict[str, Any], rate: float) -> Tensor:
        """Advance the moments, and return what this step adds to d's numerator, and its denominator, of all ranks."""
        (beta1, beta2), d, d0 = group["betas"], group["d"], group["d0"]
        device = group["params"][0].device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["p0"] = p.clone()
                state |= {name: torch.zeros_like(p) for name in ("s", "exp_avg", "exp_avg_sq")}
            sums[0] += torch.dot(p.grad.flatten(), (state["p0"] - p).flatten()) * (d / d0) * rate
            state["exp_avg"].mul_(beta1).add_(p.grad, alpha=d * (1.0 - beta1))
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=d * d * (1.0 - beta2))
            weight = (d / d0) * (d if group["safeguard_warmup"] else rate)
            state["s"].mul_(group["beta3"]).add_(p.grad, alpha=weight)
            sums[1] += state["s"].abs().sum()
        if self._add_over_ranks:
            self._add_over_ranks(sums)
        return sums


def _correction(group: dict[str, Any]) -> float:
    if not group["bias_correction"]:
        return 1.0
    (beta1, beta2), step = group["betas"], group["num_steps"]
    return math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
