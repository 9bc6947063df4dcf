"""What a LoRA does to weights: its change row by row, DoRA's lengths, and the low-rank part of a difference.

Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353.
"""

import torch
from torch import Tensor

from wan_dist.adapters.lora_files import LoraModule

_EXACT_SVD_SIZE = 1024
_OVERSAMPLING = 32


def change_of_rows(module: LoraModule, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of scale * B @ A, [rows, in * kernel] fp32."""
    return (module.b[start:stop].flatten(1).float() @ module.a.flatten(1).float()) * module.scale


def apply_to_rows(rows: Tensor, start: int, module: LoraModule, multiplier: float) -> Tensor:
    """Return rows of the weight with the LoRA applied, fp32.

    Args:
        rows: [rows, ...] of the weight, fp32.
        start: number of the first of them.
        module: the LoRA of this weight.
        multiplier: strength; 1 is as trained. DoRA's whole change is multiplied, as ComfyUI does.
    """
    stop = start + rows.shape[0]
    change = change_of_rows(module, start, stop).view_as(rows)
    if module.magnitude is None:
        return rows + multiplier * change
    changed = rows + change
    length = row_lengths(rows if module.magnitude_over_base else changed)
    factor = module.magnitude[start:stop].float() / length
    changed *= factor.reshape(-1, *[1] * (rows.dim() - 1))
    return changed if multiplier == 1 else rows + multiplier * (changed - rows)


def row_lengths(rows: Tensor) -> Tensor:
    """Return the 2-norm of each row, [rows] fp32."""
    return torch.linalg.vector_norm(rows.float().flatten(1), dim=1)


def magnitude_over(base: Tensor, module: LoraModule, *, over_base: bool) -> Tensor:
    """Return a DoRA's magnitudes for a reader that divides by |W| (`over_base`) or by |W + scale * B @ A|, [out] fp32.

    Args:
        base: the weight that the LoRA was trained on, [out, in].
        module: with a magnitude.
        over_base: what the reader divides by.
    """
    assert module.magnitude is not None
    if over_base == module.magnitude_over_base:
        return module.magnitude.float()
    before = row_lengths(base)
    after = row_lengths(base.float() + change_of_rows(module, 0, base.shape[0]).view_as(base))
    return module.magnitude.float() * (before / after if over_base else after / before)


def low_rank_part(difference: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Return A [rank, in], B [out, rank] whose product is the nearest of that rank to a difference, and what is left.

    Large matrices use a randomised SVD with 32 extra columns and 4 power iterations (arXiv:0909.4061).

    Args:
        difference: [out, in] fp32.
        rank: at most min(out, in).
        seed: of the randomised SVD.

    Returns:
        A, B (the singular values split evenly between them), and |difference - B @ A| / |difference|, 0 for no change.
    """
    if min(difference.shape) <= _EXACT_SVD_SIZE:
        u, s, vh = torch.linalg.svd(difference, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(difference, q=rank + _OVERSAMPLING, niter=4)
        vh = v.mH
    root = s[:rank].sqrt()
    a, b = root[:, None] * vh[:rank], u[:, :rank] * root
    total = float(torch.linalg.vector_norm(difference))
    left = float(torch.linalg.vector_norm(difference - b @ a)) / total if total else 0.0
    return a.contiguous(), b.contiguous(), left
