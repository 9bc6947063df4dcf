"""Exports of checkpoints: what other programs load is what was trained."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from tests.checkpoints import write_run
from tests.loras import distance, output_of, tiny_transformer, trained_lora
from wan_dist.core.errors import CheckpointError
from wan_dist.io.component_weights import find_checkpoint
from wan_dist.io.consolidate import LAYOUTS, Export, Progress, consolidate
from wan_dist.models.wan.build import make_tiny_pipeline

COMPONENTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    return make_tiny_pipeline("t2v-A14B", tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, torch.Tensor]]:
    """Two experts with every weight moved, as full training leaves them."""
    generator = torch.Generator().manual_seed(0)
    return {
        component: {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tiny_transformer(seed=number + 2).state_dict().items()
        }
        for number, component in enumerate(COMPONENTS)
    }


def full_run(run_dir: Path, base: Path, trained: Any, **options: Any) -> Path:
    return write_run(run_dir, trained, method={"kind": "full"}, variant="t2v-A14B", model_path=base, **options)


def export(run: Path, out: Path, layout: str = "diffusers", **options: Any) -> Path:
    told: list[int] = []
    given = {"dtype": torch.float32, "max_shard_bytes": 10**9} | options
    consolidate(find_checkpoint(run), out, layout=layout, progress=Progress(told.append, told.append), **given)
    assert sum(told[1:]) == told[0]  # what it announced is what it wrote and read back
    return out


def expected_output(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    model = tiny_transformer()
    model.load_state_dict(tensors)
    return output_of(model)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_diffusers_loads_both_trained_experts(world_size: int, base: Path, trained: Any, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", base, trained, world_size=world_size)
    out = export(run, tmp_path / "out", max_shard_bytes=500_000)
    pipeline: Any = WanPipeline.from_pretrained(str(out), local_files_only=True)
    for component in COMPONENTS:
        loaded = getattr(pipeline, component).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in trained[component].items())
        assert (out / component / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert not torch.equal(expected_output(trained["transformer"]), expected_output(trained["transformer_2"]))


@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_original_names_load_back_as_the_trained_experts(layout: str, base: Path, trained: Any, tmp_path: Path) -> None:
    out = export(full_run(tmp_path / "run", base, trained), tmp_path / "mine", layout)
    names = {
        "original": [
            "high_noise_model/diffusion_pytorch_model.safetensors",
            "low_noise_model/diffusion_pytorch_model.safetensors",
        ],
        "comfyui": ["mine_high_noise.safetensors", "mine_low_noise.safetensors"],
    }[layout]
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.safetensors")) == names
    for name, component in zip(names, COMPONENTS, strict=True):
        assert {"head.modulation", "blocks.1.self_attn.q.weight"} < set(load_file(out / name))
        loaded = WanTransformer3DModel.from_single_file(
            str(out / name), config=str(base / component), local_files_only=True
        )
        assert distance(output_of(loaded), expected_output(trained[component])) == 0.0
    if layout == "original":
        config = json.loads((out / "high_noise_model" / "config.json").read_text())
        assert {key: config[key] for key in ("_class_name", "model_type", "in_dim", "num_layers", "text_dim")} == {
            "_class_name": "WanModel", "model_type": "t2v", "in_dim": 16, "num_layers": 2, "text_dim": 64
        }  # fmt: skip


def test_one_expert_alone(base: Path, trained: Any, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", base, {"transformer_2": trained["transformer_2"]})
    assert [p.name for p in export(run, tmp_path / "c", "comfyui").glob("*.safetensors")] == ["c_low_noise.safetensors"]
    out = export(run, tmp_path / "d", expert="low_noise")
    high = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    untouched = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(high[name], tensor) for name, tensor in untouched.items())
    with pytest.raises(CheckpointError, match="--expert high_noise was not trained; it has low_noise"):
        export(run, tmp_path / "e", expert="high_noise")


def test_the_card_of_one_expert_names_that_one(base: Path, trained: Any, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", base, trained)
    for number, (expert, said) in enumerate([("low_noise", "low_noise"), (None, "high_noise, low_noise")]):
        out = export(run, tmp_path / f"out-{number}", "comfyui", expert=expert)
        assert f"| trained | {said} |" in (out / "README.md").read_text()


def test_headers_and_card_say_where_the_weights_come_from(base: Path, trained: Any, tmp_path: Path) -> None:
    out = export(full_run(tmp_path / "run", base, trained), tmp_path / "mine", "comfyui", dtype=torch.bfloat16)
    content = (out / "mine_low_noise.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])["__metadata__"]
    assert "modelspec.hash_sha256" not in header  # of LoRAs and words only
    assert header["modelspec.timestep_range"] == "0,875"
    config_digest = hashlib.sha256((tmp_path / "run" / "config.yaml").read_bytes()).hexdigest()
    told = {name.removeprefix("wan_dist."): value for name, value in header.items() if name.startswith("wan_dist.")}
    assert told == {
        "variant": "t2v-A14B", "component": "transformer_2", "expert": "low_noise", "step": "7", "weights": "last",
        "method": '{"kind": "full"}', "data_digest": "d1g3st", "config_sha256": config_digest,
    }  # fmt: skip
    card = (out / "README.md").read_text()
    for said in ("base_model: Wan-AI/Wan2.2-T2V-A14B", "step 7, bf16, comfyui", "| last loss | 0.25 |", "lr: 0.001"):
        assert said in card
    assert "/secret/place" not in card


def test_the_running_average_is_exported_when_asked_for(base: Path, trained: Any, tmp_path: Path) -> None:
    averages = {name: {k: v * 0.5 for k, v in tensors.items()} for name, tensors in trained.items()}
    run = full_run(tmp_path / "run", base, trained, averages=averages, world_size=3)
    out = export(run, tmp_path / "out", ema=True)
    for component in COMPONENTS:
        found = load_file(out / component / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in averages[component].items())
    run = full_run(tmp_path / "other", base, trained)
    with pytest.raises(CheckpointError, match="kept no average"):
        export(run, tmp_path / "none", ema=True)


def test_a_dry_run_checks_and_writes_nothing(base: Path, trained: Any, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", base, trained)
    told: list[int] = []
    options: Any = {"dtype": torch.bfloat16, "max_shard_bytes": 10**9, "progress": Progress(told.append, told.append)}
    consolidate(find_checkpoint(run), tmp_path / "out", layout="comfyui", dry_run=True, **options)
    assert told == [2 * 2 * sum(tensor.numel() for tensors in trained.values() for tensor in tensors.values())]
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        consolidate(find_checkpoint(run), run, layout="diffusers", dry_run=True, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_layout_is_one_function_in_a_table(base: Path, trained: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def upper_case(export: Export, folder: Path) -> str:
        for component, tensors in export.weights.items():
            export.write(folder, component, {name.upper(): tensor for name, tensor in tensors.items()})
        return "load_file"

    monkeypatch.setitem(LAYOUTS, "upper case", upper_case)
    run = full_run(tmp_path / "run", base, {"transformer": trained["transformer"]})
    out = export(run, tmp_path / "out", "upper case")
    found = load_file(out / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(found[name.upper()], tensor) for name, tensor in trained["transformer"].items())
    assert "load_file" in (out / "README.md").read_text()


def lora_run(run_dir: Path, base: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a run that trained a LoRA of each expert; return it and each trained expert's output."""
    components, outputs, method = {}, {}, {}
    for number, component in enumerate(COMPONENTS):
        lora = trained_lora(seed=number + 2, adapter_seed=10 + number, **options)  # the seeds of the tiny pipeline
        named = {n: p for n, p in lora.model.named_parameters() if "lora_" in n}
        components[component] = {name: parameter.detach() for name, parameter in named.items()}
        outputs[component] = output_of(lora.model)
        method = {"kind": "lora", **lora.settings}
    return write_run(run_dir, components, method=method, variant="t2v-A14B", model_path=base), outputs


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_lora_computes_what_the_adapter_did(use_dora: bool, base: Path, tmp_path: Path) -> None:
    run, outputs = lora_run(tmp_path / "run", base, use_dora=use_dora)
    with pytest.raises(CheckpointError, match="use wan-dist lora export, or --merge-lora"):
        export(run, tmp_path / "out")
    out = export(run, tmp_path / "out", merge_lora=True)
    pipeline: Any = WanPipeline.from_pretrained(str(out), local_files_only=True)
    for component in COMPONENTS:
        assert distance(output_of(getattr(pipeline, component)), outputs[component]) < 2e-6


def test_nothing_is_left_of_an_export_that_fails(base: Path, trained: Any, tmp_path: Path) -> None:
    broken = {name: dict(tensors) for name, tensors in trained.items()}
    broken["transformer_2"]["proj_out.bias"] = torch.full_like(broken["transformer_2"]["proj_out.bias"], torch.inf)
    run = full_run(tmp_path / "run", base, broken)
    with pytest.raises(CheckpointError, match=r"proj_out\.bias: holds values that are not finite"):
        export(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        export(full_run(tmp_path / "good", base, trained), tmp_path / "out")
