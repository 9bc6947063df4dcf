"""Files that are laid out before their tensors are copied are the files that torch and safetensors write."""

import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from wan_dist.io.file_image import FileImage, safetensors_image, torch_image


def content_of(image: FileImage) -> bytes:
    target = torch.zeros(image.size, dtype=torch.uint8)
    image.copy_to(target)
    return target.numpy().tobytes()


def nested() -> dict[str, Any]:
    flat = torch.arange(12.0)
    return {
        "flat": flat,
        "view": flat[3:7],  # shares its storage
        "bf16": torch.arange(5).to(torch.bfloat16),
        "empty": torch.empty(0),
        "scalar": torch.tensor(7),
        "groups": [{"lr": 1e-3, "params": [torch.ones(3, 3).t()]}],
    }


def test_a_torch_image_loads_as_the_value_with_views_shared() -> None:
    value = nested()
    loaded = torch.load(io.BytesIO(content_of(torch_image(value))), weights_only=True)
    assert set(loaded) == set(value)
    for key in ("flat", "view", "bf16", "empty", "scalar"):
        assert loaded[key].dtype == value[key].dtype
        assert torch.equal(loaded[key], value[key])
    assert loaded["view"].untyped_storage().data_ptr() == loaded["flat"].untyped_storage().data_ptr()
    assert torch.equal(loaded["groups"][0]["params"][0], torch.ones(3, 3))


def test_a_torch_image_is_torchs_own_file_but_for_checksums(tmp_path: Path) -> None:
    value = nested()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    assert torch_image(value).size == len(buffer.getvalue())
    path = tmp_path / "image.pt"
    path.write_bytes(content_of(torch_image(value)))
    mapped = torch.load(path, mmap=True, weights_only=True)
    assert torch.equal(mapped["flat"], value["flat"])


def test_a_safetensors_image_reads_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "part": torch.arange(9.0)[2:5], "b": torch.zeros(3).bfloat16()}
    tensors |= {"none": torch.empty(0), "bytes": torch.arange(7, dtype=torch.uint8)}
    path = tmp_path / "image.safetensors"
    path.write_bytes(content_of(safetensors_image(tensors)))
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert len(content_of(safetensors_image(tensors))) <= len(save(tensors)) + 64
