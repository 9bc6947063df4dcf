"""Weights into ZeRO-3 partitions: each rank reads only its own slices, and no rank ever holds the whole model.

diffusers has no ZeRO-3 loader: `from_pretrained` inside `zero.Init` fails, and with a DeepSpeed config announced it
silently does not partition (diffusers 0.42.1, deepspeed 0.19.8).
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan_dist.core.errors import ModelError

WEIGHTS_NAME = "diffusion_pytorch_model"
_CHUNK_ELEMENTS = 16 << 20


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return which file of a diffusers model folder holds each tensor.

    Raises:
        ModelError: the folder has no safetensors weights, or an index names a file that is absent.
    """
    index = folder / f"{WEIGHTS_NAME}.safetensors.index.json"
    single = folder / f"{WEIGHTS_NAME}.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{index}: cannot be read ({error!r}); download the model again.") from None
        missing = sorted({f for f in weight_map.values() if not (folder / f).is_file()})
        if missing:
            raise ModelError(f"{index}: names {missing[0]}, which is not in the folder; download the model again.")
        return {name: folder / file for name, file in weight_map.items()}
    if single.is_file():
        with _open(single) as handle:
            return dict.fromkeys(handle.keys(), single)
    raise ModelError(f"{folder}: has neither {single.name} nor {index.name}; a diffusers model folder is needed.")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}).") from None


def build_partitioned(build: Callable[[], nn.Module], ds_config: Mapping[str, Any]) -> nn.Module:
    """Return the module that `build` makes, its parameters partitioned over the ranks as they are created.

    The caller must rebuild every buffer that `build` computes: inside `zero.Init` even `torch.arange(dtype=float64)`
    comes out in bf16, which moves WAN's RoPE tables by up to 2.0 (`deepspeed.runtime.zero.partition_parameters`).
    """
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=dict(ds_config)):
        return build()


@torch.no_grad()
def fill_partitions(module: nn.Module, folder: Path) -> None:
    """Copy this rank's slice of every tensor in `folder` into a partitioned module; no communication.

    Must run before `deepspeed.initialize`, which makes the fp32 masters from these slices.

    Raises:
        ModelError: a tensor is missing, superfluous, of another shape or not finite.
    """
    files = tensor_files(folder)
    parameters = dict(module.named_parameters())
    _check_names(folder, set(files), set(parameters))
    for path in sorted(set(files.values())):
        with _open(path) as handle:
            for name in (n for n, f in files.items() if f == path):
                source = handle.get_slice(name)
                _fill(parameters[name], source, f"{path}: {name}")


def _check_names(folder: Path, found: set[str], wanted: set[str]) -> None:
    problems = [f"lacks {n}" for n in sorted(wanted - found)] + [f"has unknown {n}" for n in sorted(found - wanted)]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{folder}: does not fit its config.json: {', '.join(problems[:3])}{more}.")


def _fill(parameter: Any, source: Any, where: str) -> None:
    shape = torch.Size(source.get_shape())
    if shape != parameter.ds_shape:
        raise ModelError(f"{where}: has shape {list(shape)}, config.json says {list(parameter.ds_shape)}.")
    target: Tensor = parameter.ds_tensor
    size = target.ds_numel  # type: ignore[attr-defined]
    start = parameter.ds_zero_partition_rank * size
    stop = min(start + size, shape.numel())
    for offset, values in _flat_range(source, shape, start, stop):
        if not torch.isfinite(values).all():
            raise ModelError(f"{where}: holds values that are not finite.")
        target.narrow(0, offset - start, values.numel()).copy_(values)
    filled = max(stop - start, 0)
    if filled < size:
        # DeepSpeed leaves the tail of the last rank uninitialised, and it would be saved and hashed.
        target.narrow(0, filled, size - filled).zero_()


def _flat_range(source: Any, shape: torch.Size, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (flat offset, values) that cover elements [start, stop) of a row-major tensor, reading whole rows."""
    if not shape:
        if start < stop:
            yield 0, source[...].reshape(1)
        return
    row = math.prod(shape[1:])
    step = max(_CHUNK_ELEMENTS // max(row, 1), 1)
    for first in range(start // row, -(-stop // row), step):
        last = min(first + step, -(-stop // row))
        flat = source[first:last].reshape(-1)
        low, high = max(start, first * row), min(stop, last * row)
        yield low, flat[low - first * row : high - first * row]
