"""Optimizers by name: a table of builders over the libraries' classes.

ZeRO hands an optimizer flat pieces of weights: one 1-D tensor per parameter group (stages 1, 2) or sub-group (stage
3, which calls `step` once for each). Optimizers that treat every number alone do not notice. Those that look at whole
matrices, or keep one number for all weights, do, and silently become something else; `config.check_optim` says which
combinations are refused, and the tests hold every other one against the same optimizer on whole weights.
"""

import difflib
import inspect
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wan_dist.core.errors import ConfigError
from wan_dist.train.prodigy import ShardedProdigy

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class OptimizerOptions:
    """Values every optimizer takes.

    Attributes:
        lr: learning rate; the loop sets it anew at every step.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        offloaded: whether masters and moments live in host memory while training runs on an accelerator.
        zero_stage: how DeepSpeed partitions; 0 leaves every rank the whole weights.
        decay: all: every weight decays; matrices: biases, norms and modulation tables do not.
        extra: further keyword arguments of the optimizer's class.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    offloaded: bool
    zero_stage: int = 3
    decay: str = "all"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def common(self) -> dict[str, Any]:
        """Return what every class takes under the same name, and the further arguments."""
        return {
            "lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay, **self.extra,
        }  # fmt: skip


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer of the table.

    Attributes:
        build: returns it around groups of parameters.
        load: returns the class or function whose signature says which further arguments there are; raises
            ConfigError where its library is not installed.
        owned: its arguments that have keys of their own in the configuration.
        whole_step: it must see all weights in one call of `step`, so that ZeRO-3 may not cut sub-groups.
        zero_keys: DeepSpeed's `zero_optimization` keys that it needs.
    """

    build: Callable[[Groups, OptimizerOptions], torch.optim.Optimizer]
    load: Callable[[], Callable[..., Any]]
    owned: tuple[str, ...] = ("lr", "betas", "eps", "weight_decay")
    whole_step: bool = False
    zero_keys: Mapping[str, Any] = field(default_factory=dict)


def build_optimizer(
    name: str, parameters: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """Return the optimizer of a run's trained parameters.

    Args:
        name: a key of `OPTIMIZERS`.
        parameters: name and parameter of everything that is trained.
        options: checked before.
    """
    kind = OPTIMIZERS[name]
    named = list(parameters)
    if kind.build is _muon:
        return kind.build(_muon_groups(named, options), options)
    if options.decay == "all":
        return kind.build([{"params": [p for _, p in named]}], options)
    decayed = [p for key, p in named if decays(key, p)]
    rest = [p for key, p in named if not decays(key, p)]
    return kind.build([g for g in ({"params": decayed}, {"params": rest, "weight_decay": 0.0}) if g["params"]], options)


def zero_settings(name: str) -> dict[str, Any]:
    """Return the `zero_optimization` keys that an optimizer needs of DeepSpeed."""
    kind = OPTIMIZERS[name]
    whole = {"sub_group_size": 2**62} if kind.whole_step else {}
    return {**whole, **kind.zero_keys}


def check_extra(name: str, extra: Mapping[str, Any]) -> None:
    """Return if the optimizer's class takes the further arguments.

    Raises:
        ConfigError: it takes no such argument, the configuration has a key for it, or its library is missing.
    """
    kind = OPTIMIZERS[name]
    parameters = inspect.signature(kind.load()).parameters.values()
    named = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    allowed = [n for n in named if n not in ("self", "params", "foreach", "add_over_ranks", *kind.owned)]
    for key in extra:
        if key in kind.owned:
            raise ConfigError(f"optim.options.{key}: set optim.{key} instead.")
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(allowed) or 'none'}."
            raise ConfigError(f"optim.options.{key}: {name} takes no such argument; {hint}")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether `decay: matrices` lets a parameter decay: biases, norms and modulation tables do not."""
    return len(_shape(parameter)) >= 2 and "norm" not in name and "scale_shift_table" not in name


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # of a partitioned one, whose own shape is empty


def _adamw(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    if options.offloaded:
        if shutil.which("c++") or shutil.which("g++"):
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options.common())
        logger.warning("no C++ compiler for DeepSpeed's CPU Adam: torch's AdamW steps the offloaded weights, slower")
    return torch.optim.AdamW(groups, fused=True, **options.common())


def _adamw_8bit(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    return _load_8bit()(groups, **options.common())


def _adafactor(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=options.lr, weight_decay=options.weight_decay, **options.extra)


def _lion(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    lion = _load_pytorch_optimizer("Lion")
    return lion(groups, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, **options.extra)


def _prodigy(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    return ShardedProdigy(groups, **options.common(), add_over_ranks=_add_over_ranks if options.zero_stage else None)


def _add_over_ranks(sums: Tensor) -> None:
    # Shards lie on the host where they are offloaded, and NCCL reduces on the accelerator only.
    on_device = sums.cuda() if torch.distributed.get_backend() == "nccl" else sums
    torch.distributed.all_reduce(on_device)
    sums.copy_(on_device)


def _schedule_free(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    return _load_pytorch_optimizer("ScheduleFreeAdamW")(groups, **options.common())


def _muon(groups: Groups, options: OptimizerOptions) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam(groups)


def _muon_settings(momentum: float = 0.95, ns_method: str = "gram", adam_lr: float = 3e-4) -> dict[str, Any]:
    """Return Muon's further settings.

    Args:
        momentum: decay rate of its momentum.
        ns_method: how its update is made orthogonal, gram or standard.
        adam_lr: peak rate of AdamW, which steps what Muon is not for; it follows the same schedule.
    """
    if ns_method not in ("gram", "standard"):
        raise ConfigError(f"optim.options.ns_method = {ns_method}; use gram or standard.")
    return {"momentum": momentum, "ns_method": ns_method, "adam_lr": adam_lr}


def _muon_groups(named: list[tuple[str, nn.Parameter]], options: OptimizerOptions) -> Groups:
    """Return Muon's group, the matrices inside of blocks, and AdamW's: tables, biases, norms, first and last layers."""
    settings = _muon_settings(**options.extra)
    groups: Groups = []
    for muon, decayed in ((True, True), (False, True), (False, False)):
        members = []
        for key, parameter in named:
            is_muon = len(_shape(parameter)) == 2 and "blocks." in key
            if is_muon == muon and (muon or options.decay == "all" or decays(key, parameter)) == decayed:
                parameter.use_muon = muon  # type: ignore[attr-defined]  # where DeepSpeed looks
                members.append(parameter)
        if not members:
            continue
        group: dict[str, Any] = {"params": members, "use_muon": muon, "lr": options.lr}
        group["weight_decay"] = options.weight_decay if decayed else 0.0
        if muon:
            group |= {"momentum": settings["momentum"], "ns_method": settings["ns_method"]}
        else:
            ratio = settings["adam_lr"] / options.lr
            group |= {"betas": options.betas, "eps": options.eps, "lr": settings["adam_lr"], "lr_ratio": ratio}
        groups.append(group)
    return groups


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the rate of an optimizer's groups; a group with `lr_ratio` gets that times `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def _load_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"optim.name = adamw_8bit: bitsandbytes cannot be loaded here ({str(error).splitlines()[0]}); "
            "pip install 'wan_dist[optimizers]' on a machine that it supports, or use adamw."
        ) from error
    return AdamW8bit


def _load_pytorch_optimizer(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ConfigError(
            f"optim.name: {name} comes from pytorch-optimizer, which is not installed; "
            "pip install 'wan_dist[optimizers]', or use adamw."
        ) from error
    return getattr(pytorch_optimizer, name)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, lambda: torch.optim.AdamW),
    "adamw_8bit": OptimizerKind(_adamw_8bit, _load_8bit),
    "adafactor": OptimizerKind(_adafactor, lambda: torch.optim.Adafactor, owned=("lr", "weight_decay")),
    "lion": OptimizerKind(_lion, lambda: _load_pytorch_optimizer("Lion"), owned=("lr", "betas", "weight_decay")),
    "prodigy": OptimizerKind(_prodigy, lambda: ShardedProdigy, whole_step=True),
    "schedule_free": OptimizerKind(
        _schedule_free, lambda: _load_pytorch_optimizer("ScheduleFreeAdamW"), whole_step=True
    ),
    # Its update needs whole gradients, which reduce-scatter would not leave on any rank.
    "muon": OptimizerKind(_muon, lambda: _muon_settings, zero_keys={"reduce_scatter": False}),
}
