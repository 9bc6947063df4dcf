"""Weight files of WAN transformers, in any naming, as streams under diffusers' names."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from wan_dist.core.errors import ModelError
from wan_dist.io.tensor_stream import TensorStream, of_file
from wan_dist.models.wan.keys import COMFYUI_PREFIX, tensor_to_diffusers, tensor_to_original

WEIGHTS_NAME = "diffusion_pytorch_model"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALE_MARKS = ("scaled_fp8", ".scale_weight", ".scale_input", ".weight_scale")


@dataclass(frozen=True)
class ModelFiles:
    """A transformer's weights, opened and not read.

    Attributes:
        tensors: by diffusers' names.
        naming: diffusers, original or comfyui, as the files have it.
        metadata: header strings of the first file that has any.
    """

    tensors: dict[str, TensorStream]
    naming: str
    metadata: dict[str, str]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of most of the weights: that of the largest tensor."""
        return max(self.tensors.values(), key=lambda tensor: tensor.count).dtype


def open_model(path: Path) -> ModelFiles:
    """Return the weights of a transformer's folder or single file.

    Args:
        path: a `.safetensors` file, or a folder that holds an index or safetensors files.

    Raises:
        ModelError: none there, unreadable, quantised, or not WAN's tensors.
    """
    found: dict[str, TensorStream] = {}
    metadata: dict[str, str] = {}
    for file in weight_files(path):
        header, data_start = _header(file)
        strings = header.pop("__metadata__", {})
        metadata = metadata or strings
        handle = file.open("rb", buffering=0)  # stays open: the streams read from it
        for name, entry in header.items():
            if name in found:
                raise ModelError(f"{file}: {name} is in another file of {path} too.")
            dtype = _dtype(file, name, entry["dtype"])
            offset = data_start + entry["data_offsets"][0]
            found[name] = of_file(handle, offset, tuple(entry["shape"]), dtype)
    if not found:
        raise ModelError(f"{path}: holds no tensors.")
    tensors, naming = _renamed(path, found)
    return ModelFiles(tensors, naming, metadata)


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a model file, or of a folder: what its index names, or all in it.

    Raises:
        ModelError: there are none, or the index names one that is absent.
    """
    if not path.exists():
        raise ModelError(f"{path}: absent.")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{path}: only .safetensors files are read; pickles (.pt, .pth, .bin) can run code.")
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise ModelError(f"{path}: has {len(indices)} indices ({indices[0].name}, {indices[1].name}); leave one.")
    if indices:
        try:
            names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{indices[0]}: cannot be read ({error!r}); download the model again.") from None
        files = [path / Path(str(name)).name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: is named by {indices[0].name} and absent; download the model again.")
    if not files:
        hint = "; name its transformer folder" if (path / "model_index.json").is_file() else ""
        raise ModelError(f"{path}: holds no .safetensors files{hint}.")
    return files


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header and where its tensors begin; the library has checked that offsets and sizes agree."""
    try:
        with safe_open(file, framework="np"):
            pass
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            return json.loads(handle.read(length)), 8 + length
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: cannot be read as safetensors ({error}).") from None


def _dtype(file: Path, name: str, dtype: str) -> torch.dtype:
    if dtype.startswith("F8") or any(name.endswith(mark) for mark in _SCALE_MARKS):
        raise ModelError(f"{file}: fp8 weights ({name}) have lost what training needs; use the bf16 or fp16 file.")
    if dtype not in _DTYPES:
        raise ModelError(f"{file}: {name} is stored as {dtype}; only fp32, fp16 and bf16 are read.")
    return _DTYPES[dtype]


def _renamed(path: Path, found: dict[str, TensorStream]) -> tuple[dict[str, TensorStream], str]:
    if all(tensor_to_original(name) for name in found):
        # `patch_embedding` has the same name in both; a file of nothing else would be no model.
        return found, "diffusers"
    prefixed = any(name.startswith(COMFYUI_PREFIX) for name in found)
    tensors: dict[str, TensorStream] = {}
    for name, tensor in found.items():
        ours = tensor_to_diffusers(name.removeprefix(COMFYUI_PREFIX))
        if ours is None and ".lora_" in name:
            raise ModelError(f"{path}: holds a LoRA ({name}) and no model; wan-dist lora merge adds one to a model.")
        if ours is None:
            raise ModelError(f"{path}: {name} is no tensor of a WAN 2.2 transformer.")
        tensors[ours] = tensor
    return tensors, "comfyui" if prefixed else "original"


def in_naming(tensors: Mapping[str, TensorStream], naming: str) -> dict[str, TensorStream]:
    """Return tensors under the names of a naming.

    Args:
        tensors: by diffusers' names.
        naming: diffusers, original or comfyui.

    Raises:
        ModelError: a tensor has no original name.
    """
    if naming == "diffusers":
        return dict(tensors)
    prefix = COMFYUI_PREFIX if naming == "comfyui" else ""
    renamed = {}
    for name, tensor in tensors.items():
        original = tensor_to_original(name)
        if original is None:
            raise ModelError(f"{name}: is no tensor of a WAN 2.2 transformer, so it has no original name.")
        renamed[prefix + original] = tensor
    return renamed
