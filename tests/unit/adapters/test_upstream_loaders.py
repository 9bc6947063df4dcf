"""What diffusers' own loader makes of each kind of LoRA file; why the formats are written as they are.

These rows are of diffusers 0.42.1. One that changes is good news or bad, but docs/formats.md must then change too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from tests.loras import Trained, distance, output_of, tiny_transformer, trained_lora
from wan_dist.adapters.lora_formats import lora_tensors
from wan_dist.models.wan.keys import module_to_original

EXACT = 2e-6  # fp32, the scale applied in another place than peft applies it
Writer = Callable[[Trained, Path], dict[str, Tensor] | None]


def pairs(trained: Trained, stem: Callable[[str, str], str], down: str, up: str, **options: bool) -> dict[str, Tensor]:
    tensors = {}
    for name, module in trained.weights.modules.items():
        key = stem(name, str(module_to_original(name)))
        tensors[f"{key}.{down}.weight"] = module.a.clone()
        tensors[f"{key}.{up}.weight"] = module.b * (module.scale if options.get("baked") else 1.0)
        if options.get("alpha"):
            tensors[f"{key}.alpha"] = torch.tensor(module.alpha)
    return tensors


def original(down: str, up: str, **options: bool) -> Writer:
    return lambda trained, _: pairs(trained, lambda _ours, name: f"diffusion_model.{name}", down, up, **options)


def kohya(trained: Trained, _: Path) -> dict[str, Tensor]:
    def stem(_ours: str, name: str) -> str:
        return f"lora_unet_{name.replace('.', '_')}"

    return pairs(trained, stem, "lora_down", "lora_up", alpha=True)


def diffusers_without_metadata(trained: Trained, _: Path) -> dict[str, Tensor]:
    return pairs(trained, lambda name, _original: f"transformer.{name}", "lora_A", "lora_B")


def diffusers_own_saver(trained: Trained, file: Path) -> None:
    adapter = trained.model.peft_config["default"].to_dict()
    layers: Any = get_peft_model_state_dict(trained.model)
    WanPipeline.save_lora_weights(
        str(file.parent), layers, weight_name=file.name, transformer_lora_adapter_metadata=adapter
    )


EXACTLY, WRONG = "exactly", "at the wrong strength, in silence"
TABLE: dict[str, tuple[str, Writer, Any]] = {
    "diffusers, no metadata": ("full", diffusers_without_metadata, WRONG),
    "diffusers' saver with metadata": ("full", diffusers_own_saver, EXACTLY),
    "original, A and B, alpha": ("full", original("lora_A", "lora_B", alpha=True), EXACTLY),
    "original, down and up, alpha": ("full", original("lora_down", "lora_up", alpha=True), EXACTLY),
    "original, no alpha": ("full", original("lora_A", "lora_B"), WRONG),
    "original, scale in B": ("full", original("lora_A", "lora_B", baked=True), EXACTLY),
    "original, scale in B, q and v": ("qv", original("lora_A", "lora_B", baked=True), EXACTLY),
    "original, scale in B, embedders and head": ("all", original("lora_A", "lora_B", baked=True), EXACTLY),
    "original, q and v, alpha": ("qv", original("lora_A", "lora_B", alpha=True), EXACTLY),
    "original, embedders and head, alpha": ("all", original("lora_A", "lora_B", alpha=True), ValueError),
    "kohya, all of the blocks": ("full", kohya, EXACTLY),
    "kohya, q and v": ("qv", kohya, KeyError),
    "kohya, attention": ("attention", kohya, KeyError),
    "kohya, embedders and head": ("all", kohya, IndexError),
}


def two_transformers() -> Any:
    absent: Any = None
    scheduler: Any = UniPCMultistepScheduler()
    models = {"transformer": tiny_transformer(), "transformer_2": tiny_transformer()}
    return WanPipeline(absent, absent, absent, scheduler, **models)


@pytest.mark.parametrize("row", TABLE)
def test_diffusers_loads_a_file(row: str, tmp_path: Path) -> None:
    targets, write, result = TABLE[row]
    trained = trained_lora(targets=targets)
    file = tmp_path / "lora.safetensors"
    tensors = write(trained, file)
    if tensors is not None:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    pipeline = two_transformers()
    if isinstance(result, type):
        with pytest.raises(result):
            pipeline.load_lora_weights(str(file))
        return
    pipeline.load_lora_weights(str(file))
    off = distance(output_of(pipeline.transformer), output_of(trained.model))
    assert off < EXACT if result == EXACTLY else off > 0.02


@pytest.mark.parametrize(
    ("layout", "targets", "error"),
    [("comfyui", "full", ValueError), ("kohya", "full", ValueError), ("kohya", "all", IndexError)],
)
def test_diffusers_refuses_the_dora_of_other_programs(
    layout: str, targets: str, error: type[Exception], tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(lora_tensors(trained_lora(targets=targets, use_dora=True).weights, layout, torch.float32), file)
    with pytest.raises(error):
        two_transformers().load_lora_weights(str(file))


@pytest.mark.parametrize("prefix", ["transformer", "transformer_2"])
def test_the_low_noise_expert_is_loaded_from_keys_of_the_high_noise_one(prefix: str, tmp_path: Path) -> None:
    trained = trained_lora()
    tensors = pairs(trained, lambda name, _: f"{prefix}.{name}", "lora_A", "lora_B", baked=True)
    save_file(tensors, tmp_path / "lora.safetensors")
    pipeline = two_transformers()
    untouched = output_of(tiny_transformer())
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"), load_into_transformer_2=True)
    wanted = output_of(trained.model) if prefix == "transformer" else untouched  # ignored
    assert distance(output_of(pipeline.transformer_2), wanted) < EXACT
    assert distance(output_of(pipeline.transformer), untouched) == 0.0
