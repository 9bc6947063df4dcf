"""Names of WAN's tensors, against diffusers' own converter."""

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from tests.loras import distance, output_of, tiny_transformer
from tests.official import official_shapes
from wan_dist.adapters.lora_files import LoraModule, LoraWeights
from wan_dist.adapters.lora_formats import lora_tensors
from wan_dist.models.wan.keys import (
    COMFYUI_PREFIX,
    flat_to_diffusers,
    module_to_diffusers,
    module_to_original,
    takes_lora,
    tensor_to_diffusers,
    tensor_to_original,
)
from wan_dist.models.wan.variants import VARIANTS


def full_size(name: str) -> WanTransformer3DModel:
    """Return a variant's transformer in its real size, without memory."""
    spec = VARIANTS[name]
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=spec.num_heads,
            attention_head_dim=spec.width // spec.num_heads,
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            ffn_dim=spec.ffn_width,
            num_layers=spec.num_layers,
        )


def original_names(tensors: dict[str, Any]) -> dict[str, Any]:
    renamed = {tensor_to_original(name): tensor for name, tensor in tensors.items()}
    assert None not in renamed
    return {str(name): tensor for name, tensor in renamed.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_the_full_size_model_go_to_the_original_and_back(variant: str) -> None:
    tensors = full_size(variant).state_dict()
    original = original_names(tensors)
    assert {name: tuple(t.shape) for name, t in original.items()} == official_shapes(VARIANTS[variant])
    assert [tensor_to_diffusers(name) for name in original] == list(tensors)
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {n: tuple(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("prefix", ["", COMFYUI_PREFIX])
@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_our_names_as_the_same_model(variant: str, prefix: str, tmp_path: Any) -> None:
    model = tiny_transformer(variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)  # norms too, or a swap of two would not show
    theirs = convert_wan_transformer_to_diffusers(original_names(model.state_dict()))
    assert set(theirs) == set(model.state_dict())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    file = tmp_path / "original.safetensors"
    save_file({prefix + name: tensor for name, tensor in original_names(model.state_dict()).items()}, file)
    model.save_config(tmp_path / "config")
    loaded = WanTransformer3DModel.from_single_file(str(file), config=str(tmp_path / "config"), local_files_only=True)
    assert distance(output_of(loaded), output_of(model)) == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_layer_takes_a_lora_and_has_one_flat_name(variant: str) -> None:
    model = full_size(variant)
    layers = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv3d))]
    assert [name for name, _ in model.named_modules() if takes_lora(name)] == layers
    originals = [str(module_to_original(name)) for name in layers]
    assert [module_to_diffusers(name) for name in originals] == layers
    for names in (layers, originals):
        assert [flat_to_diffusers(name.replace(".", "_")) for name in names] == layers


@pytest.mark.parametrize("layout", ["original", "comfyui", "kohya"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_stem_of_a_full_size_lora_is_a_weight_of_the_official_model(variant: str, layout: str) -> None:
    weights = {n.removesuffix(".weight"): s for n, s in official_shapes(VARIANTS[variant]).items() if len(s) > 1}
    modules = {
        name: LoraModule(torch.zeros(1, *module.weight.shape[1:]), torch.zeros(module.weight.shape[0], 1), 2.0)
        for name, module in full_size(variant).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    tensors = lora_tensors(LoraWeights(modules, "made"), layout, torch.bfloat16)
    if layout == "kohya":
        official = {f"lora_unet_{stem.replace('.', '_')}": shape for stem, shape in weights.items()}
    else:
        official = {f"diffusion_model.{stem}": shape for stem, shape in weights.items()}
    ups = {n: t for n, t in tensors.items() if n.endswith((".lora_B.weight", ".lora_up.weight"))}
    assert len(ups) == len(modules)
    for name, up in ups.items():
        stem = name.rpartition(".lora_")[0]
        down = tensors[name.replace("lora_B", "lora_A").replace("lora_up", "lora_down")]
        assert official[stem] == (up.shape[0], down.shape[1])


@pytest.mark.parametrize(
    "name", ["blocks.0.attn3.to_q.weight", "blocks.01.attn1.to_q.weight", "proj_out", "head.weight"]
)
def test_other_names_are_no_names_of_wan(name: str) -> None:
    assert tensor_to_original(name) is None
    assert tensor_to_diffusers(name) is None
