"""One training step on 2 ZeRO-3 ranks against a plain PyTorch loop written here from the formulas."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file

from tests.jobs import pack_clips, write_config
from tests.parity.one_step_program import filled
from wan_dist.core.rng import generator, uniform
from wan_dist.data.clips import ClipDataset
from wan_dist.data.mixture import ShardSource
from wan_dist.data.shapes import draw_clips
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.parallel.launch import run_ranks

PROGRAM = Path(__file__).with_name("one_step_program.py")


@dataclass(frozen=True)
class Case:
    variant: str
    expert: str | None
    folder: str
    shift: float
    sigma_range: tuple[float, float]
    given: dict[str, float]
    micro: int = 1
    prior: bool = False


# The draws of seed 3 give each mixture both kinds; with a micro-batch of 2 they share one.
CASES = [
    Case("ti2v-5B", None, "transformer", 5.0, (0.0, 1.0), {"i2v_probability": 0.5}, micro=2),
    Case("t2v-A14B", "low_noise", "transformer_2", 12.0, (0.0, 0.875), {}),
    Case("i2v-A14B", "high_noise", "transformer", 5.0, (0.9, 1.0), {"flf2v_probability": 0.5}),
    Case("ti2v-5B", None, "transformer", 5.0, (0.0, 1.0), {"i2v_probability": 0.5}, micro=2, prior=True),
]
DROPOUT = 0.14
LORA: dict[str, Any] = {"rank": 2, "alpha": 3.0, "targets": [r"blocks\..*"]}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.variant}-{c.expert}-{'prior' if c.prior else 'full'}")
def test_loss_and_gradients_equal_a_plain_loop(case: Case, tmp_path: Path):
    clips = draw_clips(9, 64, 64)[:4]
    shards = pack_clips(tmp_path, clips, fps=8)
    model = make_tiny_pipeline(case.variant, tmp_path / "model", [c.caption for c in clips])
    config = write_config(
        tmp_path / "config.yaml",
        run_dir=tmp_path / "run",
        model={"path": str(model), "variant": case.variant, "expert": case.expert, "dtype": "fp32"},
        method={"kind": "lora", **LORA} if case.prior else {"kind": "full"},
        data={
            "shards": [{"path": str(shards)}, {"path": str(shards), "kind": "prior"}] if case.prior else str(shards),
            "sizes": [[64, 64]],
            "num_frames": [9],
            "fps": 8.0,
            "caption_dropout": DROPOUT,
            **case.given,
        },
        train={"num_steps": 1, "global_batch_size": 4, "micro_batch_size": case.micro, "seed": 3},
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(PROGRAM)]
    assert run_ranks([*command, str(config), str(tmp_path / "got")], env=environment) == 0
    ranks = [load_file(tmp_path / f"got.rank{r}.safetensors") for r in range(2)]
    positions = [tuple(p) for r in ranks for p in r["positions"].tolist()]
    assert len(set(positions)) == 4

    transformer = WanTransformer3DModel.from_pretrained(model / case.folder).train()
    base = WanTransformer3DModel.from_pretrained(model / case.folder)
    if case.prior:
        _add_adapters(transformer, ranks[0])
    trained = {n: p for n, p in transformer.named_parameters() if p.requires_grad}
    assert {f"grad.{name}" for name in trained} == {name for name in ranks[0] if name.startswith("grad.")}
    for name, parameter in trained.items():
        if not case.prior:
            assert torch.equal(ranks[0][f"weight.{name}"], parameter), f"{name} was not loaded exactly"
    kinds: set[str] = set()
    losses = [_plain_loss(case, transformer, base, model, shards, p, kinds) for p in positions]
    assert len(kinds) == (4 if case.prior else 2 if case.given else 1), kinds
    torch.stack(losses).mean().backward()

    found = torch.cat([r["losses"] for r in ranks])
    expected = torch.stack(losses).detach().double().view(-1, case.micro).mean(dim=1)
    # fp32 on both sides; gradient checkpointing and the partitioned matmuls change the order of sums only.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for name, parameter in trained.items():
        ours, theirs = ranks[0][f"grad.{name}"], parameter.grad
        assert theirs is not None, name
        scale = float(theirs.abs().max()) + 1e-12
        assert float((ours - theirs).abs().max()) / scale < 1e-4, name
        assert torch.equal(ours, ranks[1][f"grad.{name}"]), f"{name} differs between ranks"
    if not case.prior:
        rope: Any = transformer.rope
        exact = torch.stack([rope.freqs_cos, rope.freqs_sin])
        for stage in {int(name.split(".")[1]) for name in ranks[0] if name.startswith("bf16.")}:
            kept = {name.removeprefix(f"bf16.{stage}."): t for name, t in ranks[0].items() if f"bf16.{stage}." in name}
            assert kept["rope"].dtype == exact.dtype
            assert torch.equal(kept["rope"], exact)
            # The files are fp32: masters made from the module's bf16 weights would differ.
            for name, parameter in trained.items():
                assert torch.equal(kept[f"master.{name}"], parameter), (stage, name)


def _add_adapters(transformer: Any, rank: dict[str, torch.Tensor]) -> None:
    """peft's adapters with the job's A and the B that its program gave them."""
    names = [n for n, m in transformer.named_modules() if n.startswith("blocks.") and isinstance(m, torch.nn.Linear)]
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=names))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(filled(parameter.shape) if ".lora_B." in name else rank[f"weight.{name}"])


def _plain_loss(
    case: Case, transformer: Any, base: Any, model: Path, shards: Path, place: tuple[int, int], kinds: set[str]
) -> torch.Tensor:
    """The objective of design.md section 3 for one sample, by nothing of ours but the keyed random numbers."""
    bucket, position = place
    frames, prompt, is_prior = _sample(case, shards, bucket, position)
    vae = AutoencoderKLWan.from_pretrained(model / "vae")
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        clean = _normalised(vae, video)
        text = DiffusionPipeline.from_pretrained(model, transformer=None, transformer_2=None).encode_prompt(
            [prompt], do_classifier_free_guidance=False, max_sequence_length=512
        )[0]
    low, high = (s / (case.shift - (case.shift - 1) * s) for s in case.sigma_range)
    u = low + (high - low) * uniform(3, "sigma", bucket, position)
    sigma = case.shift * u / (1 + (case.shift - 1) * u)
    assert case.sigma_range[0] <= sigma <= case.sigma_range[1]
    noise = torch.randn(clean.shape[1:], generator=generator(3, "noise", bucket, position))[None]
    inputs, timestep, counted = (1 - sigma) * clean + sigma * noise, torch.tensor([1000 * sigma]), slice(None)
    image = uniform(3, "i2v", bucket, position) < case.given.get("i2v_probability", 0)
    last = uniform(3, "flf2v", bucket, position) < case.given.get("flf2v_probability", 0)
    kinds.add(f"image {image}, last {last}, prior {is_prior}")
    if image:
        # The pipeline's: the first frame encoded alone, a timestep for each of the 3 x 2 x 2 tokens, 0 for the given.
        with torch.no_grad():
            inputs[:, :, :1] = _normalised(vae, video[:, :, :1])
        timestep = torch.tensor([[0.0] * 4 + [1000 * sigma] * 8])
        counted = slice(1, None)
    if case.variant == "i2v-A14B":
        given = torch.cat([video[:, :, :1], torch.zeros_like(video[:, :, 1:])], dim=2)
        mask = torch.zeros(1, 4, *clean.shape[2:])
        mask[:, :, 0] = 1
        if last:
            given[:, :, -1] = video[:, :, -1]
            mask[:, 3, -1] = 1
        with torch.no_grad():
            inputs = torch.cat([inputs, mask, _normalised(vae, given)], dim=1)
    target = noise - clean
    if is_prior:
        with torch.no_grad():
            target = base(inputs, timestep, text, return_dict=False)[0]
    predicted = transformer(inputs, timestep, text, return_dict=False)[0]
    return ((predicted - target)[:, :, counted] ** 2).mean()


def _normalised(vae, video: torch.Tensor) -> torch.Tensor:
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean, std = (torch.tensor(v).view(shape) for v in (vae.config.latents_mean, vae.config.latents_std))
    return (vae.encode(video).latent_dist.mean - mean) / std


def _sample(case: Case, shards: Path, bucket: int, position: int) -> tuple[Any, str, bool]:
    sources = [ShardSource(shards), ShardSource(shards, kind="prior")] if case.prior else shards
    dataset = ClipDataset.open(sources, sizes=[(64, 64)], num_frames=[9], fps=8.0)
    ref = dataset.order(4, 64, 3).at(bucket, position)
    clip = dataset.load(bucket, ref.shard, ref.index, choice=0.0, crop_xy=(0.5, 0.5))
    dropped = uniform(3, "caption_dropout", bucket, position) < DROPOUT
    assert len(clip.captions) == 1
    assert math.isfinite(float(clip.frames.mean()))
    return clip.frames, "" if dropped else clip.captions[0], case.prior and ref.shard == 1
