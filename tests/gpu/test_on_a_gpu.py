"""What only an accelerator can show: its kernels, its optimizer, memory that moves, one whole job. `pytest -m gpu`."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import pack_clips, write_config
from tests.processes import run_cli
from wan_dist.core.errors import ConfigError
from wan_dist.data.shapes import draw_clips
from wan_dist.models.wan.build import build_transformer, make_tiny_pipeline
from wan_dist.models.wan.compact import bind_compact
from wan_dist.models.wan.forward import predict_velocity
from wan_dist.models.wan.variants import get_variant
from wan_dist.train.blocks import checkpoint_blocks, choose_attention

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
# bf16 has 8 bits of mantissa; two kernels round at other places and a few roundings add up.
BF16 = 4e-2


def _transformer(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model: Any = build_transformer(get_variant("t2v-A14B"))  # heads of 24: kernels want a multiple of 8
    bind_compact(model.to(DEVICE, dtype))
    choose_attention(model, "auto", dtype, DEVICE)
    return model.train()


def _gradients(model: Any, context: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output and all gradients of one forward and backward."""
    dtype = model.patch_embedding.weight.dtype
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, 16, 3, 16, 16, generator=generator).to(DEVICE, dtype)
    text = torch.randn(1, 512, 64, generator=generator).to(DEVICE, dtype)
    with context():
        out = predict_velocity(model, noisy, torch.full((1,), 700.0, device=DEVICE), text, None)
        out.float().square().mean().backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach().float(), found


def _assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-12


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_attention_kernels_agree(backend: str) -> None:
    model = _transformer(torch.bfloat16)
    context = checkpoint_blocks(model, "block", offload=False)
    choose_attention(model, "sdpa", torch.bfloat16, DEVICE)
    theirs, their_gradients = _gradients(model, context)
    try:
        choose_attention(model, backend, torch.bfloat16, DEVICE)
    except ConfigError as error:
        pytest.skip(str(error))
    ours, gradients = _gradients(model, context)
    _assert_close(ours, theirs, BF16)
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in gradients.items():
        # Keys' biases move every score of a row alike: their gradients are rounding and nothing else.
        if not name.endswith("to_k.bias"):
            _assert_close(gradient, their_gradients[name], 2 * BF16)


@pytest.mark.parametrize("mode", ["block", "attention"])
@pytest.mark.parametrize("offload", [False, True])
def test_memory_options_change_no_gradient(mode: str, offload: bool) -> None:
    """Inputs that went to host memory and back are the same bits; the same kernels run again."""
    model = _transformer(torch.float32)
    theirs, their_gradients = _gradients(model, checkpoint_blocks(model, "none", offload=False))
    ours, gradients = _gradients(model, checkpoint_blocks(model, mode, offload=offload))
    _assert_close(ours, theirs, 1e-6)
    for name, gradient in gradients.items():
        if not name.endswith("to_k.bias"):
            _assert_close(gradient, their_gradients[name], 1e-4)


def test_offloaded_inputs_leave_device_memory() -> None:
    model = _transformer(torch.float32)
    peaks = []
    for offload in (False, True):
        context = checkpoint_blocks(model, "block", offload=offload)
        noisy = torch.randn(1, 16, 9, 32, 32, device=DEVICE)
        text = torch.randn(1, 512, 64, device=DEVICE)
        with context():
            out = predict_velocity(model, noisy, torch.full((1,), 700.0, device=DEVICE), text, None)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.memory_allocated())
            out.sum().backward()
        del out
        model.zero_grad(set_to_none=True)
    assert peaks[1] < peaks[0], f"{peaks[0]} bytes are held after the forward pass, with offloading {peaks[1]}"


def test_fused_adamw_is_adamw() -> None:
    model = _transformer(torch.float32)
    twin = copy.deepcopy(model)
    fused = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.1, foreach=False, fused=False)
    for step in range(3):
        generator = torch.Generator(DEVICE).manual_seed(step)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator, device=DEVICE)
            theirs.grad = ours.grad.clone()
        fused.step()
        plain.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the tiny ti2v-5B on one device."""
    folder = tmp_path_factory.mktemp("gpu")
    clips = draw_clips(9, 64, 64)[:4]
    shards = pack_clips(folder, clips, fps=8)
    model = make_tiny_pipeline("ti2v-5B", folder / "model", [clip.caption for clip in clips])
    return write_config(
        folder / "config.yaml",
        run_dir=folder / "run",
        model={"path": str(model), "variant": "ti2v-5B"},
        data={"shards": str(shards), "sizes": [[64, 64]], "num_frames": [9], "fps": 8.0, "num_workers": 0},
        optim={"lr": 1e-3},
        train={"num_steps": 3, "global_batch_size": 2, "micro_batch_size": 1},
        parallel={"offload_optimizer": "none"},
    )


def _losses(config: Path, name: str, *overrides: str) -> list[float]:
    run_dir = config.parent / name
    done = run_cli("launch", config, "--num-gpus", 1, f"run_dir={run_dir}", *overrides)
    assert done.status == 0, done.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def test_a_job_trains_and_offloading_is_the_same_job(config: Path) -> None:
    """bf16 with fp32 masters; DeepSpeed's Adam on the host and torch's on the device differ by rounding."""
    losses = _losses(config, "on-device")
    assert len(losses) == 3
    offloaded = ["parallel.offload_optimizer=cpu", "parallel.offload_param=cpu", "train.offload_hidden_states=true"]
    assert _losses(config, "offloaded", *offloaded) == pytest.approx(losses, rel=BF16)
