"""LoRA files out of checkpoints, into weights and out of them, through the commands."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.checkpoints import write_run
from tests.loras import ALPHA, RANK, Trained, distance, output_of, tiny_transformer, trained_lora
from wan_dist.adapters.lora_files import LoraModule
from wan_dist.adapters.lora_formats import LAYOUTS, LoraLayout
from wan_dist.cli.lora import app
from wan_dist.core.errors import CheckpointError, ConfigError, ModelError
from wan_dist.io.component_weights import find_checkpoint
from wan_dist.io.lora_export import export_loras
from wan_dist.io.model_files import open_model
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.keys import COMFYUI_PREFIX, tensor_to_original

EXACT = 2e-6  # fp32, the scale applied in another place than peft applies it
EXPERTS = {"transformer": "high_noise", "transformer_2": "low_noise"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return make_tiny_pipeline("t2v-A14B", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def experts() -> dict[str, Trained]:
    """A LoRA of each expert, on the weights that the tiny pipeline has."""
    return {c: trained_lora(seed=number + 2, adapter_seed=10 + number) for number, c in enumerate(EXPERTS)}


def write_lora_run(run_dir: Path, base: Path, trained: dict[str, Trained]) -> Path:
    components = {
        component: {n: p.detach() for n, p in one.model.named_parameters() if "lora_" in n}
        for component, one in trained.items()
    }
    settings = next(iter(trained.values())).settings
    return write_run(
        run_dir, components, method={"kind": "lora", **settings}, variant="t2v-A14B", model_path=base, world_size=3
    )


@pytest.fixture(scope="module")
def run(base: Path, experts: dict[str, Trained], tmp_path_factory: Any) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("run") / "run", base, experts)


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def exported(run: Path, folder: Path, *options: str) -> dict[str, Path]:
    """Export both experts in fp32; return their files by component."""
    files = call("export", run, folder / "fox.safetensors", "--dtype", "fp32", *options).split()
    assert [Path(file).name for file in files] == ["fox_high_noise.safetensors", "fox_low_noise.safetensors"]
    return dict(zip(EXPERTS, map(Path, files), strict=True))


def load(folder: Path) -> Any:
    return WanPipeline.from_pretrained(str(folder), local_files_only=True)


@torch.no_grad()
def latents_of(pipeline: Any) -> torch.Tensor:
    """Return the pipeline's latents after three steps, the last by the low-noise expert."""
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt="a red circle", height=64, width=64, num_frames=5, num_inference_steps=3, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    )  # fmt: skip
    return result.frames


@pytest.fixture(scope="module")
def trained_latents(base: Path, experts: dict[str, Trained]) -> torch.Tensor:
    pipeline = load(base)
    for component, one in experts.items():
        setattr(pipeline, component, one.model)
    seen: list[str] = []
    hooks = [
        one.model.register_forward_hook(lambda *_, name=component: seen.append(name))
        for component, one in experts.items()
    ]
    latents = latents_of(pipeline)
    for hook in hooks:
        hook.remove()
    assert seen == ["transformer", "transformer", "transformer_2"]
    return latents


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers", "kohya"])
def test_the_pipeline_draws_what_the_trained_experts_draw(
    layout: str, base: Path, run: Path, trained_latents: torch.Tensor, tmp_path: Path
) -> None:
    files = exported(run, tmp_path, "--format", layout)
    pipeline = load(base)
    assert distance(latents_of(pipeline), trained_latents) > 0.05
    pipeline.load_lora_weights(str(files["transformer"]))
    pipeline.load_lora_weights(str(files["transformer_2"]), load_into_transformer_2=True)
    assert distance(latents_of(pipeline), trained_latents) < 1e-5
    swapped = load(base)
    swapped.load_lora_weights(str(files["transformer_2"]))
    swapped.load_lora_weights(str(files["transformer"]), load_into_transformer_2=True)
    assert distance(latents_of(swapped), trained_latents) > 0.05


def test_export_says_what_it_is_and_takes_one_expert(run: Path, tmp_path: Path) -> None:
    files = exported(run, tmp_path)
    with safe_open(files["transformer_2"], framework="pt") as handle:
        header = handle.metadata()
    content = files["transformer_2"].read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content[8 + length :]).hexdigest()
    assert header["modelspec.architecture"] == "wan2.1/lora"
    assert (header["wan_dist.expert"], header["modelspec.timestep_range"]) == ("low_noise", "0,875")
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")  # the scale is in B
    one = call("export", run, tmp_path / "one.safetensors", "--expert", "low_noise").split()
    assert [Path(file).name for file in one] == ["one_low_noise.safetensors"]
    assert {tensor.dtype for tensor in load_file(one[0]).values()} == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="exists; give a new file"):
        call("export", run, tmp_path / "one.safetensors", "--expert", "low_noise")


def test_a_lora_format_is_one_record_in_a_table(run: Path, experts: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def product(name: str, module: LoraModule) -> dict[str, torch.Tensor]:
        return {f"{name}.product": module.scale * module.b @ module.a}

    toy = LoraLayout(
        "toy", product, bakes_scale=True, carries_dora=False, header=lambda modules: {"n": f"{len(modules)}"}
    )
    monkeypatch.setitem(LAYOUTS, "toy", toy)
    given: Any = {"layout": "toy", "dtype": torch.float32, "expert": "high_noise"}
    (file,) = export_loras(find_checkpoint(run), tmp_path / "toy.safetensors", **given)
    found = load_file(file)
    for name, module in experts["transformer"].weights.modules.items():
        torch.testing.assert_close(found[f"{name}.product"], module.scale * module.b @ module.a)
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata()["n"] == str(len(found))


def test_merge_equals_the_adapters_and_unmerge_the_base(
    base: Path, run: Path, trained_latents: torch.Tensor, tmp_path: Path
) -> None:
    files = exported(run, tmp_path)
    pair = ("--lora", files["transformer"], "--lora-low", files["transformer_2"])
    call("merge", base, tmp_path / "merged", *pair)
    assert distance(latents_of(load(tmp_path / "merged")), trained_latents) < 1e-5
    call("unmerge", tmp_path / "merged", tmp_path / "back", *pair)
    for component in EXPERTS:
        before, after = (open_model(folder / component).tensors for folder in (base, tmp_path / "back"))
        for name, tensor in before.items():
            found = torch.cat(list(after[name].chunks()))
            torch.testing.assert_close(found, torch.cat(list(tensor.chunks())), rtol=0, atol=1e-6)
    with safe_open(tmp_path / "back/transformer/diffusion_pytorch_model.safetensors", framework="pt") as handle:
        done = json.loads(handle.metadata()["wan_dist.merged"])
    assert [entry["multiplier"] for entry in done] == [1.0, -1.0]


def test_a_dry_run_of_a_merge_writes_nothing(base: Path, run: Path, tmp_path: Path) -> None:
    files = exported(run, tmp_path)
    call("merge", base, tmp_path / "merged", "--lora", files["transformer"], "--dry-run")
    with pytest.raises(ModelError, match="is for the low_noise expert"):
        call("merge", base, tmp_path / "merged", "--lora", files["transformer_2"], "--dry-run")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        call("merge", base, base, "--lora", files["transformer"], "--dry-run")
    assert not (tmp_path / "merged").exists()


def test_experts_are_not_mixed_up_in_silence(base: Path, run: Path, tmp_path: Path) -> None:
    files = exported(run, tmp_path)
    with pytest.raises(ModelError, match="is for the low_noise expert and was given for the high_noise one"):
        call("merge", base, tmp_path / "merged", "--lora", files["transformer_2"])
    with pytest.raises(ModelError, match="is for the low_noise expert and was given for the high_noise one"):
        call("merge", base / "transformer", tmp_path / "merged", "--lora", files["transformer_2"])
    with pytest.raises(ConfigError, match="must be finite numbers, found nan"):
        call("merge", base, tmp_path / "merged", "--lora", files["transformer"], "--multiplier", "nan")
    with pytest.raises(ModelError, match="is one transformer, so only --lora goes with it"):
        call("merge", base / "transformer", tmp_path / "merged", "--lora-low", files["transformer_2"])
    one = ("--lora", files["transformer"], "--multiplier", 1, "--multiplier", 2)
    with pytest.raises(ConfigError, match="2 values for 1 files"):
        call("merge", base, tmp_path / "merged", *one)
    other = make_tiny_pipeline("ti2v-5B", tmp_path / "5b")
    with pytest.raises(ModelError, match="it is of another variant"):
        call("merge", other, tmp_path / "merged", "--lora", files["transformer"])
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("prefix", ["", COMFYUI_PREFIX])
def test_several_loras_go_into_a_single_file_by_their_strengths(prefix: str, tmp_path: Path) -> None:
    first, second = trained_lora(adapter_seed=1), trained_lora(targets="qv", adapter_seed=2)
    files = []
    for number, one in enumerate((first, second)):
        tensors = {}
        for name, module in one.weights.modules.items():
            tensors |= {
                f"transformer.{name}.lora.down.weight": module.a,
                f"transformer.{name}.lora.up.weight": module.b,
            }
            tensors[f"transformer.{name}.alpha"] = torch.tensor(ALPHA)
        files.append(tmp_path / f"{number}.safetensors")
        save_file({k: v.contiguous() for k, v in tensors.items()}, files[-1])
    state = tiny_transformer().state_dict()
    save_file({prefix + str(tensor_to_original(n)): t for n, t in state.items()}, tmp_path / "base.safetensors")
    strengths = ("--lora", files[0], "--multiplier", 0.5, "--lora", files[1], "--multiplier", -2)
    call("merge", tmp_path / "base.safetensors", tmp_path / "merged.safetensors", *strengths)
    merged = load_file(tmp_path / "merged.safetensors")
    assert set(merged) == {prefix + str(tensor_to_original(name)) for name in state}
    for name, tensor in state.items():
        wanted = tensor.clone()
        for one, strength in ((first, 0.5), (second, -2)):
            module = one.weights.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if module:
                wanted += strength * ALPHA / RANK * (module.b @ module.a)
        torch.testing.assert_close(merged[prefix + str(tensor_to_original(name))], wanted, rtol=1e-5, atol=1e-6)


def test_dora_goes_to_comfyui_and_back_only_with_its_base(base: Path, tmp_path: Path) -> None:
    trained = {"transformer": trained_lora(seed=2, use_dora=True)}
    run = write_lora_run(tmp_path / "run", base, trained)
    call("export", run, tmp_path / "d.safetensors", "--format", "comfyui", "--dtype", "fp32")
    file = tmp_path / "d_high_noise.safetensors"
    with pytest.raises(ModelError, match="give it by --base"):
        call("convert", file, tmp_path / "peft.safetensors", "--format", "diffusers")
    call("convert", file, tmp_path / "peft.safetensors", "--format", "diffusers", "--base", base / "transformer")
    pipeline = load(base)
    pipeline.load_lora_weights(str(tmp_path / "peft.safetensors"))
    assert distance(output_of(pipeline.transformer), output_of(trained["transformer"].model)) < 1e-5
    with pytest.raises(ModelError, match="a DoRA cannot be taken out again"):
        call("unmerge", base, tmp_path / "x", "--lora", file)


def test_extract_finds_the_lora_that_was_merged(base: Path, run: Path, experts: Any, tmp_path: Path) -> None:
    files = exported(run, tmp_path)
    call("merge", base, tmp_path / "merged", "--lora", files["transformer"])
    models = (base / "transformer", tmp_path / "merged" / "transformer")
    call("extract", *models, tmp_path / "found.safetensors", "--rank", RANK, "--dtype", "fp32")
    pipeline = load(base)
    pipeline.load_lora_weights(str(tmp_path / "found.safetensors"))
    assert distance(output_of(pipeline.transformer), output_of(experts["transformer"].model)) < 1e-4
    with pytest.raises(ModelError, match="no weight that a LoRA can change differs"):
        call("extract", models[0], models[0], tmp_path / "none.safetensors")


def test_inspect_tells_rank_alpha_targets_and_norms(run: Path, experts: dict[str, Trained], tmp_path: Path) -> None:
    file = exported(run, tmp_path, "--format", "kohya")["transformer"]
    found = json.loads(call("inspect", file, "--json"))
    assert (found["format"], found["ranks"], found["alphas"]) == ("kohya", [RANK], [ALPHA])
    assert (found["expert"], found["num_modules"], found["dora"]) == ("high_noise", 20, False)
    name = "blocks.1.ffn.net.2"
    module = experts["transformer"].weights.modules[name]
    assert found["norms"][name] == pytest.approx(float((module.scale * module.b @ module.a).norm()), rel=1e-5)
    shown = call("inspect", file)
    assert "blocks.*.attn1.to_q" in shown
    assert "kohya" in shown
