"""Weights into a model: under ZeRO-3 each rank reads only its own slices, and no rank ever holds the whole model.

diffusers has no ZeRO-3 loader: `from_pretrained` inside `zero.Init` fails, and with a DeepSpeed config announced it
silently does not partition (diffusers 0.42.1, deepspeed 0.19.8).
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wan_dist.core.errors import ModelError
from wan_dist.core.finite import is_finite

WEIGHTS_NAME = "diffusion_pytorch_model"
_CHUNK_ELEMENTS = 4 << 20  # 16 MB of fp32, and a quarter of it for the look at whether all are finite


def tensor_files(folder: Path, weights_name: str = WEIGHTS_NAME) -> dict[str, Path]:
    """Return which file of a diffusers or transformers model folder holds each tensor.

    Args:
        folder: one component of a pipeline.
        weights_name: how its weight files are called; "model" for a text encoder.
    Raises:
        ModelError: the folder has no safetensors weights, or an index names a file that is absent.
    """
    index = folder / f"{weights_name}.safetensors.index.json"
    single = folder / f"{weights_name}.safetensors"
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


def build_model(build: Callable[[], nn.Module], ds_config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return the module that `build` makes, under ZeRO-3 with its parameters partitioned; none is ever whole.

    Its weights are not initialised and its buffers are what `build` computed. As a context `zero.Init` would round them
    to bf16, and WAN's RoPE tables would be off by up to 2.0 (`deepspeed.runtime.zero.partition_parameters`).

    Args:
        build: makes the module.
        ds_config: the run's DeepSpeed configuration.
        dtype: dtype of the parameters.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = build()
    if ds_config["zero_optimization"]["stage"] < 3:
        _replace_parameters(model, lambda shape: torch.empty(shape, dtype=dtype))
    else:
        _partition_empty(model, ds_config, dtype)
    return model


def _replace_parameters(model: nn.Module, make: Callable[[torch.Size], Tensor]) -> None:
    made: dict[int, nn.Parameter] = {}  # a tied weight stays tied
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(make(old.shape), requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])


def _partition_empty(model: nn.Module, ds_config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Partition a module whose parameters have no values yet.

    `zero.Init` wants each parameter whole, sends rank 0's to all and keeps a slice. Here all of them are views of one
    buffer of zeros and nothing is sent. Zeros that are only read take no memory on a CPU: Linux maps its one zero page.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    count = max(parameter.numel() for parameter in model.parameters())
    # Of numpy, which asks for zeroed pages; torch would write the zeros.
    zeros = torch.from_numpy(np.zeros(count * dtype.itemsize, np.uint8)).view(dtype)
    accelerator: Any = get_accelerator()
    zeros = zeros.to(accelerator.current_device_name())

    class Init(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            if param.data_ptr() == zeros.data_ptr():
                self._convert_to_deepspeed_param(param)
                param.partition()
            else:  # added to the model later, such as adapters: rank 0's values are sent as ever
                super()._zero_init_param(param)

    _replace_parameters(model, lambda shape: zeros[: shape.numel()].view(shape))
    Init(module=model, config_dict_or_path=dict(ds_config))


def gather_in_blocks(examples: Sequence[nn.Module], model: nn.Module) -> None:
    """Make ZeRO-3 gather whole blocks at once, those of the examples' classes.

    One gather per block instead of one per linear layer; and DoRA reads weights outside of their own forward.
    """
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, list({type(example) for example in examples}))


@contextlib.contextmanager
def gathered_for_libraries(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Make peft gather partitioned weights that it reads while an adapter is added.

    peft asks transformers whether ZeRO-3 is on, and transformers knows only what was announced to it. Announced for
    longer, it would also partition the text encoder, which nothing ever gathers.
    """
    from transformers.integrations import deepspeed as announced

    if ds_config["zero_optimization"]["stage"] < 3:
        yield
        return
    keep = announced.HfDeepSpeedConfig(dict(ds_config))  # known to transformers while it lives
    try:
        yield
    finally:
        announced.unset_hf_deepspeed_config()
        del keep


@torch.no_grad()
def fill(module: nn.Module, folder: Path, weights_name: str = WEIGHTS_NAME) -> None:
    """Copy every tensor in `folder` into a module, of a partitioned one this rank's slices only; no communication.

    Must run before `deepspeed.initialize`, which makes the fp32 masters from these values.

    Args:
        module: as `build_model` gives it.
        folder: component folder with safetensors files.
        weights_name: as in `tensor_files`.
    Raises:
        ModelError: a tensor is missing, superfluous, of another shape or not finite.
    """
    files = tensor_files(folder, weights_name)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    _check_names(folder, set(files), parameters)
    for path in sorted(set(files.values())):
        with _open(path) as handle:
            for name in (n for n, f in files.items() if f == path):
                source = handle.get_slice(name)
                _fill(parameters[name], source, f"{path}: {name}")


@torch.no_grad()
def fill_masters(module: nn.Module, folder: Path) -> None:
    """Give the fp32 masters of trained weights what the files hold, where that is fp32; no communication.

    DeepSpeed makes them from the module's own weights: under bf16 a full fine-tune would begin beside the model that it
    was given, every weight off by up to 2^-9 of itself.

    Args:
        module: of an engine, filled from the same folder, its trained parameters under their names in the files.
        folder: as for `fill`.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    files = tensor_files(folder)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for path in sorted(set(files.values())):
        with _open(path) as handle:
            for name, parameter in trained.items():
                if files.get(name) != path or (source := handle.get_slice(name)).get_dtype() != "F32":
                    continue
                part = _part_of(parameter, torch.Size(source.get_shape()))
                values = torch.zeros(part.size)
                for offset, read in _flat_range(source, part.shape, part.start, part.stop):
                    values[offset - part.start :][: read.numel()] = read
                if hasattr(parameter, "ds_tensor"):
                    safe_set_local_fp32_param(parameter, values)
                else:
                    safe_set_full_fp32_param(parameter, values.view(part.shape))


def _check_names(folder: Path, found: set[str], parameters: Mapping[str, nn.Parameter]) -> None:
    given = {id(parameters[name]) for name in found if name in parameters}  # a tied weight may come by either name
    lacking = [name for name, parameter in parameters.items() if id(parameter) not in given]
    problems = [f"lacks {n}" for n in sorted(lacking)]
    problems += [f"has unknown {n}" for n in sorted(found) if n not in parameters]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelError(f"{folder}: does not fit its config.json: {', '.join(problems[:3])}{more}.")


def _fill(parameter: Any, source: Any, where: str) -> None:
    shape = torch.Size(source.get_shape())
    partitioned = hasattr(parameter, "ds_tensor")
    wanted = parameter.ds_shape if partitioned else parameter.shape
    if shape != wanted:
        raise ModelError(f"{where}: has shape {list(shape)}, config.json says {list(wanted)}.")
    target: Any = parameter.ds_tensor if partitioned else parameter.data.view(-1)
    part = _part_of(parameter, shape)
    for offset, values in _flat_range(source, shape, part.start, part.stop):
        if not is_finite(values):
            raise ModelError(f"{where}: holds values that are not finite.")
        target.narrow(0, offset - part.start, values.numel()).copy_(values)
    filled = max(part.stop - part.start, 0)
    if filled < part.size:
        # DeepSpeed leaves the tail of the last rank uninitialised, and it would be saved and hashed.
        target.narrow(0, filled, part.size - filled).zero_()


class _Part(NamedTuple):
    """What a rank holds of a flat tensor: elements [start, stop), and zeros up to `size`."""

    shape: torch.Size
    size: int
    start: int
    stop: int


def _part_of(parameter: Any, shape: torch.Size) -> _Part:
    if not hasattr(parameter, "ds_tensor"):
        return _Part(shape, shape.numel(), 0, shape.numel())
    size = parameter.ds_tensor.ds_numel
    start = parameter.ds_zero_partition_rank * size
    return _Part(shape, size, start, min(start + size, shape.numel()))


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
