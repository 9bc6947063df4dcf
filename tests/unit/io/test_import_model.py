"""Weights of the official repository and of ComfyUI, imported through the command."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.checkpoints import write_run
from tests.loras import tiny_transformer
from wan_dist.cli.models import app
from wan_dist.core.errors import ModelError
from wan_dist.io.component_weights import find_checkpoint
from wan_dist.io.consolidate import Progress, consolidate
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.keys import tensor_to_original
from wan_dist.models.wan.variants import VARIANTS

WEIGHTS = "diffusion_pytorch_model.safetensors"


def call(*words: object) -> str:
    result = CliRunner().invoke(app, ["import", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_official(folder: Path, base: Path, variant: str, *, layout: str = "original") -> Path:
    """Export the base's own transformers under original names."""
    names = ["transformer", "transformer_2"][: VARIANTS[variant].num_transformers]
    state = {name: load_file(base / name / WEIGHTS) for name in names}
    run = folder.with_name("run")
    write_run(run, state, method={"kind": "full"}, variant=variant, model_path=base)
    quiet = Progress(lambda _: None, lambda _: None)
    options: Any = {"layout": layout, "dtype": torch.float32, "max_shard_bytes": 400_000}
    return consolidate(find_checkpoint(run), folder, progress=quiet, **options)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def check_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_official_folder_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    base = make_tiny_pipeline(variant, tmp_path / "base")
    official = write_official(tmp_path / "official", base, variant)
    call(official, tmp_path / "alone", "--variant", variant, "--dry-run")
    assert not (tmp_path / "alone").exists()
    assert "only transformers were written" in call(official, tmp_path / "alone", "--variant", variant)
    call(official, tmp_path / "whole", "--variant", variant, "--base", base, "--link")
    assert (tmp_path / "whole" / "vae").is_symlink()
    for component in ["transformer", "transformer_2"][: VARIANTS[variant].num_transformers]:
        wanted = load_file(base / component / WEIGHTS)
        check_same(weights_in(tmp_path / "alone" / component), wanted)
        check_same(weights_in(tmp_path / "whole" / component), wanted)
    if variant != "i2v-A14B":
        pipeline: Any = WanPipeline.from_pretrained(str(tmp_path / "whole"), local_files_only=True)
        check_same(pipeline.transformer.state_dict(), load_file(base / "transformer" / WEIGHTS))


def test_single_files_of_two_experts(tmp_path: Path) -> None:
    base = make_tiny_pipeline("t2v-A14B", tmp_path / "base")
    files = write_official(tmp_path / "wan", base, "t2v-A14B", layout="comfyui")
    high, low = files / "wan_high_noise.safetensors", files / "wan_low_noise.safetensors"
    variant = ("--variant", "t2v-A14B", "--base", base)
    with pytest.raises(ModelError, match="say by --expert which one this is"):
        call(high, tmp_path / "out", *variant)
    for swapped in ([high, "--expert", "low_noise"], [low, "--expert", "high_noise"], [low, "--low", high]):
        with pytest.raises(ModelError, match=r"is for the \w+ expert and was given for the \w+ one"):
            call(swapped[0], tmp_path / "out", *swapped[1:], *variant)
    call(high, tmp_path / "both", "--low", low, *variant, "--dtype", "bf16")
    call(low, tmp_path / "one", "--expert", "low_noise", *variant)
    for folder, component in (("both", "transformer"), ("both", "transformer_2"), ("one", "transformer_2")):
        dtype = torch.bfloat16 if folder == "both" else torch.float32
        wanted = {name: tensor.to(dtype) for name, tensor in load_file(base / component / WEIGHTS).items()}
        check_same(weights_in(tmp_path / folder / component), wanted)
    check_same(weights_in(tmp_path / "one" / "transformer"), load_file(base / "transformer" / WEIGHTS))


def test_what_is_no_whole_transformer_of_the_variant_is_refused(tmp_path: Path) -> None:
    original = {str(tensor_to_original(n)): t for n, t in tiny_transformer("ti2v-5B").state_dict().items()}
    base = make_tiny_pipeline("ti2v-5B", tmp_path / "base")
    fp8 = original["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    cases: dict[str, dict[str, torch.Tensor]] = {
        "fp8 weights .* use the bf16 or fp16 file": original | {"blocks.0.ffn.0.weight": fp8},
        r"fp8 weights \(scaled_fp8\)": original | {"scaled_fp8": torch.ones(2)},
        r"lacks blocks\.1\.attn1\.to_k\.bias": {n: t for n, t in original.items() if n != "blocks.1.self_attn.k.bias"},
        r"img_emb\.proj\.1\.weight is no tensor": original | {"img_emb.proj.1.weight": torch.ones(2)},
        "holds no tensors": {},
        "stored as BOOL": original | {"head.head.bias": torch.ones(192, dtype=torch.bool)},
        "stored as I64": original | {"head.head.bias": torch.ones(2, dtype=torch.int64)},
        r"head\.head": {
            **{n: t for n, t in original.items() if n != "head.head.bias"},
            "head.head.scale": torch.ones(1),
        },
        r"proj_out\.bias is \[3\], not \[192\]": original | {"head.head.bias": torch.ones(3)},
    }
    for number, (message, tensors) in enumerate(cases.items()):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file)
        with pytest.raises(ModelError, match=message):
            call(file, tmp_path / "out", "--variant", "ti2v-5B", "--base", base)
    save_file(original, tmp_path / "good.safetensors")
    with pytest.raises(ModelError, match=r"48/48 .*, t2v-A14B has 16/16"):
        call(tmp_path / "good.safetensors", tmp_path / "out", "--variant", "t2v-A14B", "--expert", "high_noise")
    content = (tmp_path / "good.safetensors").read_bytes()
    for damaged in (b"", content[:5], content[:-10], content.replace(b"data_offsets", b"data_0ffsets")):
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(ModelError, match="cannot be read as safetensors"):
            call(tmp_path / "damaged.safetensors", tmp_path / "out", "--variant", "ti2v-5B", "--base", base)
    with pytest.raises(ModelError, match="diffusers layout already"):
        call(base, tmp_path / "out", "--variant", "ti2v-5B")
    save_file({"diffusion_model.head.head.lora_A.weight": torch.ones(1, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="holds a LoRA"):
        call(tmp_path / "lora.safetensors", tmp_path / "out", "--variant", "ti2v-5B")
    (tmp_path / "model.pth").touch()
    with pytest.raises(ModelError, match="pickles"):
        call(tmp_path / "model.pth", tmp_path / "out", "--variant", "ti2v-5B")
    assert not (tmp_path / "out").exists()
