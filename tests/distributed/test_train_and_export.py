"""Two real ranks train, save, resume and export; what they leave is what the contracts say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed.conftest import Job, Material
from tests.processes import run_cli
from wan_dist.config.load import load_config
from wan_dist.io.checkpoint import newest_whole, step_folders


def export(job: Job, out: Path, *options: str) -> Path:
    done = run_cli("consolidate", job.run_dir, out, "--dtype", "fp32", *options)
    assert (done.status, done.stdout.strip()) == (0, str(out)), done.stderr
    return out


def weights_of(pipeline: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((pipeline / "transformer").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def deepspeed_export(job: Job) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    newest = step_folders(job.run_dir / "checkpoints")[0]
    state = get_fp32_state_dict_from_zero_checkpoint(str(newest), tag="transformer")
    assert state is not None
    return dict(state)


@pytest.fixture(scope="module")
def exported(straight: Job, material: Material) -> Path:
    return export(straight, material.folder / "export-straight")


def test_resume_matches_straight_run_bit_for_bit(exported: Path, resumed: Job, material: Material) -> None:
    ours, theirs = weights_of(exported), weights_of(export(resumed, material.folder / "export-resumed"))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = load_file(material.model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(ours[name], start[name].float()) for name in ours)


def test_resume_sees_the_same_losses(straight: Job, resumed: Job) -> None:
    assert [(r["step"], r["loss"]) for r in resumed.rows()] == [(r["step"], r["loss"]) for r in straight.rows()]


def test_export_equals_deepspeeds_own(exported: Path, straight: Job) -> None:
    ours, theirs = weights_of(exported), deepspeed_export(straight)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_export_equals_deepspeeds_own_over_many_sub_groups(fp32_on_two_ranks: Job, material: Material) -> None:
    folder = export(fp32_on_two_ranks, material.folder / "export-groups", "--max-shard-size", "1MB")
    ours, theirs = weights_of(folder), deepspeed_export(fp32_on_two_ranks)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    newest = step_folders(fp32_on_two_ranks.run_dir / "checkpoints")[0]
    states = torch.load(next(newest.rglob("*rank_0_*_model_states.pt")), weights_only=False)
    assert len(states["param_shapes"]) > 3
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(ours)
    assert len(set(index["weight_map"].values())) > 1


def test_diffusers_loads_the_export_as_it_is(exported: Path, material: Material) -> None:
    from diffusers import WanPipeline

    pipeline: Any = WanPipeline.from_pretrained(str(exported), local_files_only=True)
    loaded = pipeline.transformer.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights_of(exported).items())
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        names = {p.name for p in (material.model / part).iterdir()}
        assert names == {p.name for p in (exported / part).iterdir()}


def test_run_folder_describes_the_run(straight: Job) -> None:
    folder = straight.run_dir
    assert load_config(folder / "config.yaml") == load_config(straight.config)
    status = straight.status()
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 4, 0)
    ds_config = json.loads((folder / "ds_config.json").read_text())
    assert ds_config["zero_optimization"]["stage"] == 3
    assert ds_config["bf16"] == {"enabled": True}
    assert ds_config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["versions"]["deepspeed"]


def test_tensorboard_and_metrics_hold_every_step(straight: Job) -> None:
    rows = straight.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    events = EventAccumulator(str(straight.run_dir)).Reload()
    points = events.Scalars("train/loss")
    assert [p.step for p in points] == [1, 2, 3, 4]
    assert [p.value for p in points] == pytest.approx([row["loss"] for row in rows])
    tags = set(events.Tags()["scalars"])
    assert {f"train/{n}" for n in ("grad_norm", "lr", "step_s", "data_wait_s", "tokens_per_s", "loss_smooth")} <= tags
    assert {"loss_by_expert/transformer", "lr_by_component/transformer"} <= tags
    assert any(tag.startswith("loss_by_sigma/0.9") for tag in tags)
    smooth = rows[0]["loss"]
    for row in rows:
        # One step per row: its loss is the mean over its samples, of all deciles together.
        assert row["loss_by_expert"]["transformer"] == pytest.approx(row["loss"])
        smooth = 0.98 * smooth + 0.02 * row["loss"]
        assert row["loss_smooth"] == pytest.approx(smooth)
        # 4 samples of 3 x 2 x 2 tokens.
        assert row["tokens_per_s"] == pytest.approx(48 / row["step_s"])
        assert row["host_memory_gib"] > 0.1
        assert "mfu" not in row  # no peak is known of a CPU


def test_only_rank_0_reports_and_results_stay_apart(straight: Job) -> None:
    assert straight.finished.stdout == ""
    lines = straight.finished.stderr.splitlines()
    assert any("step 4/4" in line for line in lines)
    assert not [line for line in lines if "[rank 1]" in line]


def test_checkpoint_manifest_covers_every_file(straight: Job) -> None:
    checkpoint = newest_whole(straight.run_dir / "checkpoints")
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.world_size) == (4, 2)
    on_disk = {p.relative_to(checkpoint.folder).as_posix() for p in checkpoint.folder.rglob("*") if p.is_file()}
    assert set(checkpoint.files) == on_disk - {"manifest.json"}
    assert (checkpoint.folder.parent / "latest").read_text().strip() == checkpoint.folder.name
