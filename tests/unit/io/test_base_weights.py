import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan_dist.core.errors import ModelError
from wan_dist.io import base_weights
from wan_dist.io.base_weights import base_digests


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for component in ("transformer", "transformer_2"):
        (tmp_path / "model" / component).mkdir(parents=True)
        save_file({"a": torch.ones(4)}, tmp_path / "model" / component / "weights.safetensors")
    return tmp_path / "model"


def test_a_digest_follows_the_content_and_not_the_place(model: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first = base_digests(model, ["transformer", "transformer_2"], tmp_path / "run")
    assert first["transformer"] == first["transformer_2"]
    moved = model.rename(tmp_path / "elsewhere")
    assert base_digests(moved, ["transformer"], tmp_path / "run") == {"transformer": first["transformer"]}
    save_file({"a": torch.zeros(4)}, moved / "transformer" / "weights.safetensors")
    assert base_digests(moved, ["transformer"], tmp_path / "run")["transformer"] != first["transformer"]


def test_a_file_that_did_not_change_is_read_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    read: list[Path] = []
    hashed = base_weights.sha256_of
    monkeypatch.setattr(base_weights, "sha256_of", lambda path: (read.append(path), hashed(path))[1])
    first = base_digests(model, ["transformer"], tmp_path / "run")
    assert base_digests(model, ["transformer"], tmp_path / "run") == first
    assert len(read) == 1
    os.utime(model / "transformer" / "weights.safetensors", ns=(1, 1))
    assert base_digests(model, ["transformer"], tmp_path / "run") == first
    assert len(read) == 2


def test_a_component_without_weights_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"vae: holds no \*\.safetensors"):
        base_digests(model, ["vae"], tmp_path)
