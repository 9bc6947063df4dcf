"""A real run trains a LoRA of both experts; its files give diffusers what peft computes from DeepSpeed's own export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from diffusers import WanPipeline
from peft import LoraConfig

from tests.distributed.conftest import Job, Material, launch
from tests.loras import distance, output_of
from tests.processes import run_cli
from wan_dist.adapters.lora_files import LoraWeights
from wan_dist.io.checkpoint import newest_whole, read_manifest, step_folders
from wan_dist.io.component_weights import lora_weights
from wan_dist.models.wan.build import make_tiny_pipeline

COMPONENTS = ("transformer", "transformer_2")
RANK, ALPHA, DECAY = 4, 16, 0.5


@pytest.fixture(scope="module")
def base(material: Material) -> Path:
    return make_tiny_pipeline("t2v-A14B", material.folder / "tiny-a14b")


@pytest.fixture(scope="module")
def job(material: Material, base: Path) -> Job:
    config = material.config(
        "lora-both",
        model={"path": str(base), "variant": "t2v-A14B", "expert": "both"},
        method={"kind": "lora", "rank": RANK, "alpha": float(ALPHA), "targets": "all"},
        optim={"lr": 0.02},
        train={"num_steps": 6, "global_batch_size": 2, "ema_decay": DECAY},
        checkpoint={"save_every": 1, "keep_last": 6},
    )
    return launch(config, material.run_dir("lora-both"))


@pytest.fixture(scope="module")
def trained(job: Job, base: Path) -> dict[str, Any]:
    """Each expert with peft's adapters, filled from DeepSpeed's own consolidation of the shards."""
    checkpoint = newest_whole(job.run_dir / "checkpoints")
    assert checkpoint is not None
    pipeline: Any = WanPipeline.from_pretrained(str(base), local_files_only=True)
    models = {}
    for component in COMPONENTS:
        model = getattr(pipeline, component)
        targets = checkpoint.state["method"]["targets"]
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
        state = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.folder), tag=component, exclude_frozen_parameters=True
        )
        assert state is not None
        assert all(float(value.abs().sum()) > 0 for name, value in state.items() if "lora_B" in name)
        loaded = model.load_state_dict(dict(state), strict=False)
        assert not loaded.unexpected_keys
        assert not [name for name in loaded.missing_keys if "lora_" in name]
        models[component] = model
    return models


def command(*words: object) -> list[str]:
    done = run_cli(*words)
    assert done.status == 0, done.stderr
    return done.stdout.split()


def test_exported_files_and_the_merged_model_compute_what_was_trained(
    job: Job, trained: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    files = command("lora", "export", job.run_dir, tmp_path / "fox.safetensors", "--dtype", "fp32")
    loaded: Any = WanPipeline.from_pretrained(str(base), local_files_only=True)
    untrained = {component: output_of(getattr(loaded, component)) for component in COMPONENTS}
    loaded.load_lora_weights(files[0])
    loaded.load_lora_weights(files[1], load_into_transformer_2=True)
    merged_dir = command("consolidate", job.run_dir, tmp_path / "merged", "--merge-lora", "--dtype", "fp32")[0]
    merged: Any = WanPipeline.from_pretrained(merged_dir, local_files_only=True)
    wanted = {component: output_of(model) for component, model in trained.items()}
    for component in COMPONENTS:
        other = COMPONENTS[1 - COMPONENTS.index(component)]
        assert distance(untrained[component], wanted[component]) > 0.02
        assert distance(output_of(getattr(loaded, component)), wanted[component]) < 1e-5
        assert distance(output_of(getattr(merged, component)), wanted[component]) < 1e-5
        assert distance(output_of(getattr(loaded, other)), wanted[component]) > 0.02


def test_bf16_files_stay_within_bf16s_rounding(job: Job, trained: dict[str, Any], base: Path, tmp_path: Path) -> None:
    # 8 bits of each factor: 2^-8 = 0.4 % of each product, of a change that is itself a part of the output.
    file = command("lora", "export", job.run_dir, tmp_path / "fox.safetensors", "--expert", "low_noise")[0]
    loaded: Any = WanPipeline.from_pretrained(str(base), local_files_only=True)
    loaded.load_lora_weights(file, load_into_transformer_2=True)
    with torch.no_grad():
        found = distance(output_of(loaded.transformer_2), output_of(trained["transformer_2"]))
    assert 0 < found < 0.01


def test_exported_averages_are_those_of_every_steps_weights(job: Job) -> None:
    checkpoints = [read_manifest(folder) for folder in sorted(step_folders(job.run_dir / "checkpoints"))]
    assert len(checkpoints) == 6
    for component in COMPONENTS:
        steps, average = 0, torch.zeros(1)  # B starts from zero
        for checkpoint in checkpoints:
            if checkpoint.state["component_steps"].get(component, 0) == steps:
                continue  # the step was for the other expert
            steps += 1
            decay = min(DECAY, (1 + steps) / (10 + steps))
            average = decay * average + (1 - decay) * all_of_b(lora_weights(checkpoint, component))
        assert steps > 1
        found = all_of_b(lora_weights(checkpoints[-1], component, ema=True))
        torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-7)
        assert not torch.allclose(found, all_of_b(lora_weights(checkpoints[-1], component)), rtol=1e-2)


def all_of_b(weights: LoraWeights) -> torch.Tensor:
    return torch.cat([module.b.flatten() for _, module in sorted(weights.modules.items())])
