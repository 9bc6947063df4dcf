"""Whether numbers are finite, many times as fast as `torch.isfinite(...).all()` on a CPU."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether a floating point tensor holds neither NaN nor infinity.

    Measured on 8 MB by one CPU core: bf16 0.8 ms, fp32 0.4 ms; `torch.isfinite` 17 ms and 8 ms.
    """
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and tensor.is_contiguous():
        return not tensor.numel() or bf16_bits_are_finite(tensor.detach().view(torch.int16).numpy())
    # Nothing that is not finite leaves a sum finite; finite numbers may overflow it.
    return math.isfinite(float(tensor.detach().sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())


def bf16_bits_are_finite(bits: NDArray[np.int16]) -> bool:
    """Return whether the bits of bf16 numbers, at least one, hold neither NaN nor infinity.

    Their exponent is all ones: as int16 the positive ones are the largest numbers, as uint16 the negative ones are.
    Two maxima are the fastest exact test there is in NumPy.
    """
    return bool(bits.max() < 0x7F80 and bits.view(np.uint16).max() < 0xFF80)
