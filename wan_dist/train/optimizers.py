"""Optimizers by name: a table of builders over the libraries' classes."""

import logging
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerOptions:
    """Values every optimizer takes.

    Attributes:
        lr: learning rate; the loop sets it anew at every step.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        offloaded: whether masters and moments live in host memory while training runs on an accelerator.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    offloaded: bool


def _adamw(parameters: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    common = {"lr": options.lr, "betas": options.betas, "eps": options.eps, "weight_decay": options.weight_decay}
    if options.offloaded:
        if shutil.which("c++") or shutil.which("g++"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(parameters, adamw_mode=True, **common)
        logger.warning("no C++ compiler for DeepSpeed's CPU Adam: torch's AdamW steps the offloaded weights, slower")
    return torch.optim.AdamW(parameters, fused=True, **common)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], OptimizerOptions], torch.optim.Optimizer]] = {"adamw": _adamw}
