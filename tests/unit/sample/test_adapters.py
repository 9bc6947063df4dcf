"""LoRA files in a pipeline that draws."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from tests.loras import distance, output_of, tiny_transformer, trained_lora
from wan_dist.adapters.lora_formats import LAYOUTS, lora_header, lora_tensors
from wan_dist.core.errors import ModelError
from wan_dist.io.lora_export import with_magnitudes
from wan_dist.io.tensor_stream import of_tensor
from wan_dist.sample.adapters import add_loras


def pipeline_of(model: Any) -> Any:
    return SimpleNamespace(
        transformer=model, transformer_2=None, load_lora_into_transformer=WanPipeline.load_lora_into_transformer
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", ["qv", "all"])
def test_every_format_and_choice_of_targets_is_applied(layout: str, targets: str, tmp_path: Path) -> None:
    trained = trained_lora(targets=targets)
    file = tmp_path / "lora.safetensors"
    save_file(lora_tensors(trained.weights, layout, torch.float32), file, lora_header(trained.weights, layout))
    pipeline = pipeline_of(tiny_transformer())
    add_loras(pipeline, "transformer", [(file, 1.0)])
    assert distance(output_of(pipeline.transformer), output_of(trained.model)) < 2e-6
    trained.model.set_adapters(["default"], weights=[0.5])
    pipeline.transformer.set_adapters(["lora_0"], [0.5])
    assert distance(output_of(pipeline.transformer), output_of(trained.model)) < 2e-6
    with pytest.raises(ModelError, match="has no transformer_2"):
        add_loras(pipeline, "transformer_2", [(file, 1.0)])
    with pytest.raises(ModelError, match="is of another variant"):
        add_loras(pipeline_of(tiny_transformer("ti2v-5B")), "transformer", [(file, 1.0)])


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_dora_too(layout: str, tmp_path: Path) -> None:
    trained = trained_lora(use_dora=True)
    file = tmp_path / "dora.safetensors"
    base = {name: of_tensor(tensor) for name, tensor in tiny_transformer().state_dict().items()}
    weights = with_magnitudes(trained.weights, base, over_base=layout == "comfyui")
    save_file(lora_tensors(weights, layout, torch.float32), file, lora_header(weights, layout))
    pipeline = pipeline_of(tiny_transformer())
    add_loras(pipeline, "transformer", [(file, 1.0)])
    assert distance(output_of(pipeline.transformer), output_of(trained.model)) < 2e-6


def test_a_file_for_the_other_expert_is_refused(tmp_path: Path) -> None:
    weights = trained_lora(targets="qv").weights
    file = tmp_path / "low.safetensors"
    header = lora_header(weights, "original") | {"wan_dist.expert": "low_noise"}
    save_file(lora_tensors(weights, "original", torch.float32), file, header)
    pipeline = pipeline_of(tiny_transformer())
    pipeline.transformer_2 = tiny_transformer()
    with pytest.raises(ModelError, match="is for the low_noise expert and was given for the high_noise one"):
        add_loras(pipeline, "transformer", [(file, 1.0)])
    add_loras(pipeline, "transformer_2", [(file, 1.0)])
