import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from wan_dist.core.errors import ModelError
from wan_dist.parallel import load
from wan_dist.parallel.load import WEIGHTS_NAME, tensor_files

SHAPES = [(1,), (7,), (2, 3), (5, 1), (1, 5), (3, 1, 7), (7, 2, 3), (2, 1, 3, 5), (11, 13)]


def slices(path: Path, shape: tuple[int, ...], world_size: int) -> list[torch.Tensor]:
    """Return what each rank's partition would hold, padding as NaN."""
    numel = math.prod(shape)
    part = -(-numel // world_size)
    parts = []
    with safe_open(path, framework="pt") as handle:
        source = handle.get_slice("weight")
        for rank in range(world_size):
            start, stop = rank * part, min((rank + 1) * part, numel)
            target = torch.full((part,), math.nan)
            for offset, values in load._flat_range(source, torch.Size(shape), start, stop):
                target.narrow(0, offset - start, values.numel()).copy_(values)
            parts.append(target)
    return parts


@pytest.mark.parametrize("chunk", [1, 4, 1 << 20])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_together_hold_the_flat_tensor(
    shape: tuple[int, ...], world_size: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_CHUNK_ELEMENTS", chunk)
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    save_file({"weight": tensor}, tmp_path / "t.safetensors")
    whole = torch.cat(slices(tmp_path / "t.safetensors", shape, world_size))
    assert torch.equal(whole[: tensor.numel()], tensor.flatten())
    assert whole[tensor.numel() :].isnan().all()


def test_a_scalar_goes_to_the_first_rank(tmp_path: Path) -> None:
    save_file({"weight": torch.tensor(3.0)}, tmp_path / "t.safetensors")
    first, second = slices(tmp_path / "t.safetensors", (), 2)
    assert first.tolist() == [3.0]
    assert second.isnan().all()


def test_tensor_files_reads_single_files_and_indexes(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has neither diffusion_pytorch_model\.safetensors nor"):
        tensor_files(tmp_path)
    single = tmp_path / f"{WEIGHTS_NAME}.safetensors"
    save_file({"a": torch.zeros(2)}, single)
    assert tensor_files(tmp_path) == {"a": single}
    index = tmp_path / f"{WEIGHTS_NAME}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": single.name, "b": "absent.safetensors"}}))
    with pytest.raises(ModelError, match=r"names absent\.safetensors, which is not in the folder"):
        tensor_files(tmp_path)


def test_a_damaged_file_or_index_is_named(tmp_path: Path) -> None:
    single = tmp_path / f"{WEIGHTS_NAME}.safetensors"
    single.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="cannot be read as safetensors") as caught:
        tensor_files(tmp_path)
    assert str(caught.value).startswith(str(single))
    (tmp_path / f"{WEIGHTS_NAME}.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(ModelError, match=r"index\.json: cannot be read"):
        tensor_files(tmp_path)
