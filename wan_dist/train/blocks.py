"""How the transformer's blocks compute: what they keep for the backward pass, with which attention, compiled or not."""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from wan_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)

# diffusers' names. "auto" leaves the choice of the kernel to torch, and is set all the same: diffusers keeps the last
# choice for every model of the process, and its own reset leaves that as it is (0.42.1).
ATTENTION_BACKENDS = {"auto": "native", "sdpa": "native", "flash": "flash", "cudnn": "_native_cudnn"}
_ATTENTION_OPERATORS = ("scaled_dot_product", "flash_attn", "_flash_attention", "_efficient_attention")

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def checkpoint_blocks(model: Any, mode: str, *, offload: bool) -> Context:
    """Set what blocks keep for the backward pass, and return a context for one forward and backward.

    Args:
        model: a diffusers transformer.
        mode: `none` keeps everything; `block` each block's input; `attention` its attention outputs too, so that only
            the cheaper rest is computed again.
        offload: move the blocks' inputs to host memory until the backward pass needs them.
    """
    if mode == "none":
        return contextlib.nullcontext
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "attention":
        options["context_fn"] = _attention_saved
    if not offload:
        model.enable_gradient_checkpointing(lambda block, *inputs: checkpoint(block.__call__, *inputs, **options))
        return contextlib.nullcontext
    from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload

    manager = CheckpointHiddenStatesOffload()

    def marked(block: nn.Module, hidden_states: torch.Tensor, *inputs: Any) -> Any:
        manager.mark(hidden_states)
        return checkpoint(block.__call__, hidden_states, *inputs, **options)

    model.enable_gradient_checkpointing(marked)
    return lambda: manager


def _attention_saved() -> Any:
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    name = str(operator)
    is_attention = any(part in name for part in _ATTENTION_OPERATORS)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def choose_attention(model: Any, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Set the attention of all blocks and log the kernel that runs.

    Args:
        model: a diffusers transformer.
        backend: a key of `ATTENTION_BACKENDS`.
        dtype: compute dtype.
        device: where the model computes.
    Raises:
        ConfigError: the backend's library is missing, or it refuses this device.
    """
    try:
        model.set_attention_backend(ATTENTION_BACKENDS[backend])
    except (ValueError, RuntimeError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"train.attention = {backend}: not available here ({reason}); use auto.") from None
    try:
        kernels = _kernels_of(model, dtype, device)
    except (RuntimeError, ValueError, AssertionError) as error:
        model.set_attention_backend(ATTENTION_BACKENDS["auto"])
        reason = str(error).splitlines()[0]
        raise ConfigError(f"train.attention = {backend}: does not run on {device} ({reason}); use auto.") from None
    logger.info("attention: %s, computed by %s", backend, kernels)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _kernels_of(model: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Return the operators of one small attention as the model computes it, with gradients."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    processor = model.blocks[0].attn1.processor
    heads, width = model.config.num_attention_heads, model.config.attention_head_dim
    query = torch.zeros(1, 64, heads, width, dtype=dtype, device=device, requires_grad=True)
    operators = _Operators()
    with operators:
        dispatch_attention_fn(query, query, query, backend=processor._attention_backend)
    found = [n for n in operators.names if any(part in n for part in _ATTENTION_OPERATORS)]
    return ", ".join(dict.fromkeys(found)) or "torch's plain operations"


def compile_blocks(model: Any) -> None:
    """Compile the forward pass of every block; one compilation serves all of them, since they are alike.

    The blocks' own calls stay as they are, so that DeepSpeed's hooks gather the weights outside of what is compiled.
    """
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
