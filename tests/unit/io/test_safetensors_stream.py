import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wan_dist.core.errors import CheckpointError
from wan_dist.io import safetensors_stream, tensor_stream
from wan_dist.io.consolidate import new_folder
from wan_dist.io.safetensors_stream import write_sharded
from wan_dist.io.tensor_stream import TensorStream, of_shards, of_tensor
from wan_dist.io.zero_shards import ShardedTensor

SHAPES = {"a": (3, 5), "b": (7,), "c": (), "d": (2, 3, 4), "e": (1, 11)}


def pieces_of(tensor: torch.Tensor, world_size: int) -> TensorStream:
    """Return a tensor cut as ZeRO-3 cuts it."""
    flat = tensor.flatten()
    part = math.ceil(flat.numel() / world_size)
    pieces = tuple(flat[i * part : (i + 1) * part] for i in range(world_size))
    return of_shards(ShardedTensor(tuple(tensor.shape), tensor.dtype, pieces))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(
    folder: Path, tensors: dict[str, torch.Tensor], *, dtype: torch.dtype, max_bytes: int = 1 << 30, world_size: int = 3
) -> tuple[list[Path], int]:
    counted: list[int] = []
    files = write_sharded(
        folder,
        "model",
        {name: pieces_of(tensor, world_size) for name, tensor in tensors.items()},
        dtype=dtype,
        max_shard_bytes=max_bytes,
        metadata={"format": "pt", "note": "ü"},
        on_bytes=counted.append,
    )
    return files, sum(counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 4, 4 << 20])
def test_one_file_loads_equal(
    tensors: dict[str, torch.Tensor], dtype: torch.dtype, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_stream, "CHUNK_ELEMENTS", chunk)
    files, num_bytes = write(tmp_path, tensors, dtype=dtype)
    assert files == [tmp_path / "model.safetensors"]
    assert list(tmp_path.iterdir()) == files
    loaded = load_file(files[0])
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensor.to(dtype)) for name, tensor in tensors.items())
    assert num_bytes == 2 * sum(t.numel() for t in tensors.values()) * dtype.itemsize
    with safe_open(files[0], framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "note": "ü"}


def test_several_files_have_an_index_that_names_each_tensors_file(
    tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    files, _ = write(tmp_path, tensors, dtype=torch.float32, max_bytes=100)
    assert [file.name for file in files] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(t.numel() for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_a_tensor_larger_than_a_file_gets_one_of_its_own(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    files, _ = write(tmp_path, tensors, dtype=torch.float32, max_bytes=1)
    assert [len(load_file(file)) for file in files] == [1] * len(tensors)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_named(
    tensors: dict[str, torch.Tensor], value: float, tmp_path: Path
) -> None:
    tensors["d"][1, 2, 3] = value
    with pytest.raises(CheckpointError, match="d: holds values that are not finite"):
        write(tmp_path, tensors, dtype=torch.float32)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_number_beyond_fp16_is_refused(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    tensors["a"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        write(tmp_path, tensors, dtype=torch.float16)
    write(tmp_path, tensors, dtype=torch.bfloat16)


def test_a_bit_that_changes_between_writing_and_reading_is_noticed(
    tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare_damaged(path: Path, *rest: Any) -> None:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        real(path, *rest)

    real = safetensors_stream._compare
    monkeypatch.setattr(safetensors_stream, "_compare", compare_damaged)
    with pytest.raises(CheckpointError, match="reads back differently"):
        write(tmp_path, tensors, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_tensors_of_several_dtypes_keep_them_and_lie_aligned(tmp_path: Path) -> None:
    mixed = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2), "c": torch.ones(1, dtype=torch.float16)}
    safetensors_stream.write_file(
        tmp_path / "mixed.safetensors",
        {name: of_tensor(tensor) for name, tensor in mixed.items()},
        dtype=None,
        metadata={},
        on_bytes=lambda _: None,
    )
    loaded = load_file(tmp_path / "mixed.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {n: t.dtype for n, t in mixed.items()}
    header = json.loads((tmp_path / "mixed.safetensors").read_bytes()[8:].partition(b"}}")[0] + b"}}")
    assert header["b"]["data_offsets"] == [0, 8]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = {"a": of_tensor(torch.zeros(100_000))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write past it fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written \(File too large\)"):
            write_sharded(
                tmp_path, "model", tensors, dtype=None, max_shard_bytes=10**9, metadata={}, on_bytes=lambda _: None
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(CheckpointError, match=r"needs 1000000\.0 GB and its disk has"),
        new_folder(tmp_path / "out", 10**15),
    ):
        pass
    assert not list(tmp_path.iterdir())
