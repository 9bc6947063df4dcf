"""LoRA files: what we write is what diffusers, peft and ComfyUI compute; what others write is read as they mean it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.comfyui import patched_state_dict
from tests.loras import ALPHA, RANK, Trained, distance, output_of, tiny_transformer, trained_lora
from wan_dist.adapters.lora_files import LoraModule, LoraWeights, read_lora
from wan_dist.adapters.lora_formats import LAYOUTS, lora_header, lora_tensors
from wan_dist.adapters.lora_math import apply_to_rows, low_rank_part, magnitude_over
from wan_dist.core.errors import ModelError
from wan_dist.models.wan.keys import module_to_original

EXACT = 2e-6  # fp32, the scale applied in another place than peft applies it


def pipeline_of(model: Any) -> Any:
    absent: Any = None
    scheduler: Any = UniPCMultistepScheduler()
    return WanPipeline(absent, absent, absent, scheduler, transformer=model)


def write(path: Path, weights: LoraWeights, layout: str, dtype: torch.dtype = torch.float32) -> Path:
    tensors, header = lora_tensors(weights, layout, dtype), lora_header(weights, layout)
    save_file(tensors, path, metadata={"format": "pt", **header})
    return path


def through_diffusers(file: Path, variant: str = "t2v-A14B", model: Any = None) -> Tensor:
    pipeline = pipeline_of(model or tiny_transformer(variant))
    pipeline.load_lora_weights(str(file))
    return output_of(pipeline.transformer)


def merged(weights: LoraWeights, variant: str = "t2v-A14B", multiplier: float = 1.0) -> Any:
    model = tiny_transformer(variant)
    state = model.state_dict()
    for name, module in weights.modules.items():
        weight = state[f"{name}.weight"]
        weight.copy_(apply_to_rows(weight.clone(), 0, module, multiplier))
    return model


@pytest.fixture(scope="module", params=[("full", False), ("qv", False), ("all", False), ("full", True)])
def trained(request: Any) -> Trained:
    targets, use_rslora = request.param
    return trained_lora(targets=targets, use_rslora=use_rslora)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_computes_what_was_trained(trained: Trained, layout: str, tmp_path: Path) -> None:
    wanted, base = output_of(trained.model), output_of(tiny_transformer())
    assert distance(base, wanted) > 0.05
    file = write(tmp_path / "lora.safetensors", trained.weights, layout)
    targets = set(trained.weights.modules)
    if layout in ("comfyui", "kohya") and "proj_out" in targets:
        with pytest.raises((ValueError, IndexError)):  # diffusers reads alpha keys beside block layers only
            through_diffusers(file)
    elif layout == "kohya" and "blocks.0.ffn.net.2" not in targets:
        with pytest.raises(KeyError):  # diffusers wants every linear layer of kohya's naming
            through_diffusers(file)
    else:
        assert distance(through_diffusers(file), wanted) < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_comfyui_computes_what_was_trained(trained: Trained, layout: str, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", trained.weights, layout)
    patched, unused = patched_state_dict(tiny_transformer().state_dict(), load_file(file))
    if layout == "diffusers":
        assert len(unused) == 2 * len(trained.weights.modules)  # ComfyUI knows none of these names for WAN
        return
    assert not unused
    model = tiny_transformer()
    model.load_state_dict(patched)
    assert distance(output_of(model), output_of(trained.model)) < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_reads_back_as_the_same_change(trained: Trained, layout: str, tmp_path: Path) -> None:
    read = read_lora(write(tmp_path / "lora.safetensors", trained.weights, layout))
    assert (read.layout, read.scale_stated) == (layout, layout != "original")
    assert set(read.modules) == set(trained.weights.modules)
    for name, module in read.modules.items():
        wanted = trained.weights.modules[name]
        torch.testing.assert_close(module.scale * module.b @ module.a, wanted.scale * wanted.b @ wanted.a)
    assert distance(output_of(merged(read)), output_of(trained.model)) < EXACT


def test_every_stem_is_a_weight_of_the_original_model(trained: Trained) -> None:
    weights = {
        str(module_to_original(name)) for name, _ in tiny_transformer().named_modules() if module_to_original(name)
    }
    for layout in ("original", "comfyui"):
        keys = lora_tensors(trained.weights, layout, torch.float32)
        stems = {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in keys}
        assert {stem.removeprefix("diffusion_model.") for stem in stems} <= weights
        assert len(stems) == len(trained.weights.modules)


@pytest.mark.parametrize("variant", ["ti2v-5B", "i2v-A14B"])
def test_the_other_variants_too(variant: str, tmp_path: Path) -> None:
    trained = trained_lora(variant)
    file = write(tmp_path / "lora.safetensors", trained.weights, "original")
    assert distance(through_diffusers(file, variant), output_of(trained.model)) < EXACT


def test_bf16_file_and_model_stay_within_bf16s_rounding(tmp_path: Path) -> None:
    # bf16 keeps 8 bits of a number: 2^-8 = 0.4 % of each product. Over the two tiny blocks both runs, which round at
    # different places, were found within 1.2 % of the largest output; the LoRA's own change is over 5 %.
    trained = trained_lora(targets="all")
    file = write(tmp_path / "lora.safetensors", trained.weights, "original", torch.bfloat16)
    wanted = output_of(trained.model)
    assert distance(through_diffusers(file), wanted) < 0.01
    tiny_transformer().save_pretrained(tmp_path / "model")
    model = WanTransformer3DModel.from_pretrained(str(tmp_path / "model"), torch_dtype=torch.bfloat16)
    assert distance(through_diffusers(file, model=model), wanted) < 0.03


def test_dora_is_exact_where_it_can_be_carried_and_refused_elsewhere(tmp_path: Path) -> None:
    trained = trained_lora(use_dora=True)
    wanted = output_of(trained.model)
    assert distance(output_of(merged(trained.weights)), wanted) < EXACT
    file = write(tmp_path / "diffusers.safetensors", trained.weights, "diffusers")
    assert distance(through_diffusers(file), wanted) < EXACT
    assert distance(output_of(merged(read_lora(file))), wanted) < EXACT
    with pytest.raises(ModelError, match="DoRA's magnitudes in silence; use comfyui, diffusers, kohya"):
        lora_tensors(trained.weights, "original", torch.float32)
    base = tiny_transformer().state_dict()
    over_base = {
        name: LoraModule(m.a, m.b, m.scale, magnitude_over(base[f"{name}.weight"], m, over_base=True), True)
        for name, m in trained.weights.modules.items()
    }
    for layout in ("comfyui", "kohya"):
        file = write(tmp_path / f"{layout}.safetensors", LoraWeights(over_base, "peft"), layout)
        patched, unused = patched_state_dict(base, load_file(file))
        model = tiny_transformer()
        model.load_state_dict(patched)
        assert not unused
        assert distance(output_of(model), wanted) < EXACT
        assert distance(output_of(merged(read_lora(file))), wanted) < EXACT
    for name, module in over_base.items():
        again = magnitude_over(base[f"{name}.weight"], module, over_base=False)
        torch.testing.assert_close(again, trained.weights.modules[name].magnitude)


OTHERS = {
    "musubi": lambda n, o: (
        f"lora_unet_{o.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{o.replace('.', '_')}.lora_up.weight",
    ),
    "ai-toolkit": lambda n, o: (f"diffusion_model.{o}.lora_A.weight", f"diffusion_model.{o}.lora_B.weight"),
    "diffusion-pipe": lambda n, o: (f"diffusion_model.{o}.lora_A.weight", f"diffusion_model.{o}.lora_B.weight"),
    "DiffSynth": lambda n, o: (f"{o}.lora_A.default.weight", f"{o}.lora_B.default.weight"),
    "DiffSynth, older": lambda n, o: (f"pipe.dit.{o}.lora_A.default.weight", f"pipe.dit.{o}.lora_B.default.weight"),
    "SimpleTuner": lambda n, o: (f"transformer.{n}.lora.down.weight", f"transformer.{n}.lora.up.weight"),
    "low-noise expert": lambda n, o: (f"transformer_2.{n}.lora_A.weight", f"transformer_2.{n}.lora_B.weight"),
    "ComfyUI, full prefix": lambda n, o: (
        f"model.diffusion_model.{o}.lora_down.weight",
        f"model.diffusion_model.{o}.lora_up.weight",
    ),
}


@pytest.mark.parametrize("with_alpha", [True, False])
@pytest.mark.parametrize("trainer", OTHERS)
def test_other_trainers_files_are_applied_as_they_mean_them(trainer: str, with_alpha: bool, tmp_path: Path) -> None:
    trained = trained_lora(targets="qv")
    tensors = {}
    for name, module in trained.weights.modules.items():
        down, up = OTHERS[trainer](name, str(module_to_original(name)))
        tensors |= {down: module.a, up: module.b if with_alpha else module.b * module.scale}
        if with_alpha:
            tensors[re.sub(r"[._]lora[._].*", "", down) + ".alpha"] = torch.tensor(ALPHA)
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "lora.safetensors")
    read = read_lora(tmp_path / "lora.safetensors")
    assert read.scale_stated == with_alpha
    assert distance(output_of(merged(read)), output_of(trained.model)) < EXACT


def test_a_folder_of_pefts_own_is_read_with_its_settings(tmp_path: Path) -> None:
    pattern = {r"attn2\.to_q": 8}
    config = LoraConfig(
        r=RANK, lora_alpha=6, use_rslora=True, target_modules=["to_q", "proj_out"], alpha_pattern=pattern
    )
    model = get_peft_model(tiny_transformer(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.02)
    model.save_pretrained(str(tmp_path))
    read = read_lora(tmp_path)
    assert read.layout == "peft"
    assert distance(output_of(merged(read)), output_of(model.eval())) < EXACT
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="its alpha is unknown"):
        read_lora(tmp_path)


def test_multipliers_and_sums_are_what_peft_computes() -> None:
    first, second = trained_lora(targets="full"), trained_lora(targets="qv", adapter_seed=5)
    model = first.model
    model.set_adapters(["default"], weights=[0.5])
    wanted = output_of(model)
    assert distance(output_of(merged(first.weights, multiplier=0.5)), wanted) < EXACT
    both = merged(first.weights, multiplier=0.5)
    for name, module in second.weights.modules.items():
        weight = both.state_dict()[f"{name}.weight"]
        weight.copy_(apply_to_rows(weight.clone(), 0, module, 2.0))
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=list(second.weights.modules))
    model.add_adapter(config, adapter_name="second")
    with torch.no_grad():
        for name, module in model.named_modules():
            if "second" in getattr(module, "lora_B", {}):
                module.lora_A["second"].weight.copy_(second.weights.modules[name].a)
                module.lora_B["second"].weight.copy_(second.weights.modules[name].b)
    model.set_adapters(["default", "second"], weights=[0.5, 2.0])
    assert distance(output_of(both), output_of(model)) < EXACT


def lora_file(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


A, B = torch.ones(2, 8), torch.ones(8, 2)
STEM = "diffusion_model.blocks.0.self_attn.q"
REFUSED = {
    "lacks b": {f"{STEM}.lora_A.weight": A},
    "do not multiply": {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": A},
    "of another model": {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": A},
    "LoKr factors": {f"{STEM}.lokr_w1": A},
    "bias differences": {f"{STEM}.diff_b": A},
    "trained biases": {f"{STEM}.lora_B.bias": A},
    "no part of a LoRA": {"blocks.0.attn1.to_q.weight": A, f"{STEM}.lora_A.weight": A},
    "a model's whole weights": {"blocks.0.attn1.to_q.weight": A, "blocks.0.attn1.to_q.bias": A[0]},
    "not finite": {f"{STEM}.lora_A.weight": A / 0, f"{STEM}.lora_B.weight": B},
    "twice": {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_down.weight": A.clone()},
    "is empty": {},
    "its alpha is unknown": {
        "base_model.model.proj_out.lora_A.weight": A,
        "base_model.model.proj_out.lora_B.weight": B,
    },
    "holds both transformer and transformer_2": {
        f"{c}.proj_out.lora_{k}.weight": v
        for c in ("transformer", "transformer_2")
        for k, v in (("A", A), ("B", B.clone()))
    },
    "names no module": {"transformer.blocks.0.norm2.lora_A.weight": A},
    "stored as torch.float8": {f"{STEM}.lora_A.weight": A.to(torch.float8_e4m3fn), f"{STEM}.lora_B.weight": B},
    "2 magnitudes for 8": {
        f"{STEM}.lora_A.weight": A,
        f"{STEM}.lora_B.weight": B,
        f"{STEM}.dora_scale": torch.ones(2, 1),
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(message: str, tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in REFUSED[message].items()}
    with pytest.raises(ModelError, match=message):
        read_lora(lora_file(tmp_path / "lora.safetensors", tensors))


def test_one_expert_of_a_file_with_both(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in REFUSED["holds both transformer and transformer_2"].items()}
    tensors["transformer_2.proj_out.lora_A.weight"] *= 3
    file = lora_file(tmp_path / "lora.safetensors", tensors)
    assert float(read_lora(file, "transformer_2").modules["proj_out"].a[0, 0]) == 3
    (tmp_path / "lora.pt").touch()
    for name, message in {
        "lora.pt": r"only \.safetensors files are read",
        "no": "there is no such file",
        "": "without peft's",
    }.items():
        with pytest.raises(ModelError, match=message):
            read_lora(tmp_path / name)
    one = lora_file(tmp_path / "one.safetensors", {k: v for k, v in tensors.items() if k.startswith("transformer_2")})
    with pytest.raises(ModelError, match="is for transformer_2, not for transformer"):
        read_lora(one, "transformer")
    weights = trained_lora(targets="qv").weights
    file = write(tmp_path / "low.safetensors", weights, "diffusers")  # says `transformer.`, as diffusers wants it
    assert read_lora(file, "transformer_2").modules["blocks.0.attn1.to_q"].alpha == ALPHA


def test_headers_say_what_the_tensors_hold() -> None:
    weights = trained_lora(targets="qv").weights
    said = {name: lora_header(weights, name)["ss_network_alpha"] for name in LAYOUTS}
    assert said == {"original": "4", "comfyui": "16", "diffusers": "16", "kohya": "16"}
    settings = json.loads(lora_header(weights, "diffusers")["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (RANK, ALPHA)


@pytest.mark.parametrize("shape", [(40, 24), (1300, 1100)])
def test_low_rank_part_is_the_nearest_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(shape[0], 6, generator=generator) @ torch.randn(6, shape[1], generator=generator)
    a, b, left = low_rank_part(difference, 6)
    assert left < 1e-5
    torch.testing.assert_close(b @ a, difference, rtol=1e-4, atol=1e-3)
    noisy = difference + 0.05 * torch.randn(shape, generator=generator)
    singular = torch.linalg.svdvals(noisy)
    best = float(singular[4:].norm() / singular.norm())
    assert low_rank_part(noisy, 4)[2] == pytest.approx(best, rel=1e-3)
    assert low_rank_part(torch.zeros(shape), 2)[2] == 0.0
