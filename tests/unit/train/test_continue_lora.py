"""Training goes on from a LoRA file of any format: the model with it computes at once what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.jobs import write_config
from tests.loras import RANK, TARGETS, distance, output_of, trained_lora
from wan_dist.adapters.lora_files import LoraWeights
from wan_dist.adapters.lora_formats import LAYOUTS, lora_header, lora_tensors
from wan_dist.config.load import load_config
from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import ConfigError, ModelError
from wan_dist.io.lora_export import with_magnitudes
from wan_dist.io.model_files import open_model
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.variants import get_variant
from wan_dist.train.engines import add_adapters, load_transformer

UNPARTITIONED = {"zero_optimization": {"stage": 0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return make_tiny_pipeline("t2v-A14B", tmp_path_factory.mktemp("base") / "tiny")


def settings(base: Path, folder: Path, file: Path, **method: Any) -> TrainConfig:
    path = write_config(
        folder / "train.yaml",
        run_dir=folder / "run",
        model={"path": str(base), "variant": "t2v-A14B", "expert": "high_noise", "dtype": "fp32"},
        # Another alpha than the file's: its strength must not change.
        method={"kind": "lora", "rank": RANK, "alpha": 2.0, "targets": [TARGETS["full"]]}
        | {"init_from": {"high_noise": str(file)}}
        | method,
        data={"shards": str(folder), "sizes": [[64, 64]], "num_frames": [9], "fps": 8.0},
        optim={"lr": 1e-3},
        train={"num_steps": 1, "global_batch_size": 1},
        parallel={"zero_stage": 0, "offload_optimizer": "none"},
    )
    return load_config(path)


def continued(cfg: TrainConfig) -> Any:
    model = load_transformer(cfg, get_variant("t2v-A14B"), Path(cfg.model.path) / "transformer", UNPARTITIONED)
    add_adapters(cfg, model, "high_noise", UNPARTITIONED)
    return model.eval()


def write(path: Path, weights: LoraWeights, layout: str, **header: str) -> Path:
    save_file(lora_tensors(weights, layout, torch.float32), path, lora_header(weights, layout) | header)
    return path


CASES = [(layout, False) for layout in LAYOUTS] + [(layout, True) for layout in LAYOUTS if LAYOUTS[layout].carries_dora]


@pytest.mark.parametrize(("layout", "use_dora"), CASES)
def test_training_continues_from_a_file_of_any_format(layout: str, use_dora: bool, base: Path, tmp_path: Path) -> None:
    trained = trained_lora(seed=2, use_dora=use_dora)  # the seed of the tiny pipeline's high-noise expert
    weights = trained.weights
    if use_dora and layout != "diffusers":
        weights = with_magnitudes(weights, open_model(base / "transformer").tensors, over_base=True)
    file = write(tmp_path / "lora.safetensors", weights, layout)
    model = continued(settings(base, tmp_path, file, dora=use_dora))
    assert distance(output_of(model), output_of(trained.model)) < 2e-6
    found = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(found) == (3 if use_dora else 2) * len(weights.modules)


def test_a_file_that_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", trained_lora(seed=2).weights, "original")
    with pytest.raises(ConfigError, match=r"has rank 4, method\.rank is 8; use 4"):
        continued(settings(base, tmp_path, file, rank=8))
    with pytest.raises(ConfigError, match=r"has blocks\.0\.attn1\.to_k, which is no target"):
        continued(settings(base, tmp_path, file, targets=[r".*attn1\.to_q"]))
    with pytest.raises(ConfigError, match=r"has nothing for condition_embedder\..*; method\.targets must be"):
        continued(settings(base, tmp_path, file, targets="all"))
    with pytest.raises(ConfigError, match=r"set method\.dora: False"):
        continued(settings(base, tmp_path, file, dora=True))
    low = write(tmp_path / "low.safetensors", trained_lora().weights, "comfyui", **{"wan_dist.expert": "low_noise"})
    with pytest.raises(ModelError, match="is for the low_noise expert and was given for the high_noise one"):
        continued(settings(base, tmp_path, low))
    other = write(tmp_path / "5b.safetensors", trained_lora("ti2v-5B").weights, "original")
    with pytest.raises(ConfigError, match="it is of another variant"):
        continued(settings(base, tmp_path, other))
