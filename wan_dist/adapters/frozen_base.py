"""The frozen weights under adapters in fewer bits: stored in fp8 or nf4, computed with in the run's dtype.

The bits are buffers that no state dict holds: nothing casts, broadcasts, partitions or saves them. diffusers' layerwise
casting stores fp8 too, but without scales, and exchanges a parameter's data while autograd still holds it.
Sources: fp8 E4M3, arXiv:2209.05433; NF4, arXiv:2305.14314, by bitsandbytes.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from wan_dist.core.errors import ConfigError

BaseDtype = Literal["fp8", "nf4"]
_FP8 = torch.float8_e4m3fn
_TRIAL_WIDTH = 64


def quantise_blocks(model: Any, kind: BaseDtype, device: torch.device) -> None:
    """Replace the frozen linear layers of all blocks, one by one, by ones of fewer bits on the device.

    What lies outside of the blocks (patches, timestep, text, output), norms and modulation stay as they are: 3 % of
    the weights, which the output depends on most.

    Args:
        model: a diffusers transformer on the host, adapters added, everything else frozen.
        kind: how weights are stored.
        device: where they will be.
    Raises:
        ConfigError: the library is missing, or it does not run on this device.
    """
    _try(kind, device)
    for module in list(model.blocks.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and not child.weight.requires_grad:
                setattr(module, name, FrozenLinear(child, kind, device))


def _try(kind: BaseDtype, device: torch.device) -> None:
    where = f"model.base_dtype = {kind}"
    if kind == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except (ImportError, RuntimeError) as error:
            advice = "install it with pip install 'wan_dist[optimizers]', or use fp8"
            raise ConfigError(f"{where}: bitsandbytes is needed and not there ({error}); {advice}.") from None
    try:
        layer = FrozenLinear(nn.Linear(_TRIAL_WIDTH, _TRIAL_WIDTH), kind, device)
        layer(torch.ones(1, _TRIAL_WIDTH, device=device, requires_grad=True)).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{where}: does not run on {device} ({reason}); remove it, or use the other.") from None


class FrozenLinear(nn.Module):
    """A linear layer whose weight is stored in fewer bits and never trained.

    Args:
        layer: the layer it replaces.
        kind: fp8, with a power of two per output row, or nf4, in blocks of 64 whose scales are quantised too.
        device: where the bits will be.
    """

    stored: Tensor
    exponent: Tensor

    def __init__(self, layer: nn.Linear, kind: BaseDtype, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().to(device)
        self._nf4: Any = None
        if kind == "nf4":
            from bitsandbytes.functional import quantize_4bit

            stored, self._nf4 = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
            exponent = torch.zeros(0, dtype=torch.int8, device=device)
        else:
            stored, exponent = to_fp8(weight)
        self.register_buffer("stored", stored, persistent=False)
        self.register_buffer("exponent", exponent, persistent=False)
        self.bias = layer.bias

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight that the bits stand for, [out, in]."""
        if self._nf4 is None:
            return from_fp8(self.stored, self.exponent, dtype)
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.stored, self._nf4).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias, [..., out]."""
        return _Frozen.apply(x, self)


class _Frozen(torch.autograd.Function):
    """Makes the weight again for the backward pass instead of keeping it: it would be all weights in full size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight_in(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (upstream,) = gradients
        return upstream @ ctx.layer.weight_in(upstream.dtype), None


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of a weight in fp8, [out, in] uint8, and the power of two of each row, [out, 1] int8.

    A power of two costs no rounding, here nor in bf16, and fp8's own exponent covers what it leaves of a row's range.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=1, keepdim=True).clamp(min=2.0**-100)
    exponent = torch.ceil(torch.log2(largest / torch.finfo(_FP8).max)).clamp(-120, 120)
    return torch.ldexp(rows, -exponent).to(_FP8).view(torch.uint8), exponent.to(torch.int8)


def from_fp8(stored: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight that `to_fp8` stored, [out, in]."""
    return stored.view(_FP8).to(dtype) * torch.exp2(exponent.float()).to(dtype)
