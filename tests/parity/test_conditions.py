"""Given frames against diffusers' `WanImageToVideoPipeline`, on the tiny pipelines: masks, conditions, timesteps."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline

from wan_dist.core.flow_matching import SigmaSampler
from wan_dist.data.batching import Batch
from wan_dist.data.encode import load_encoders
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.train.objective import FIRST_FRAME_NOISE, Objective

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_5b(tmp_path_factory):
    return make_tiny_pipeline("ti2v-5B", tmp_path_factory.mktemp("m") / "5b", ["a red circle moves up"])


@pytest.fixture(scope="module")
def tiny_i2v(tmp_path_factory):
    return make_tiny_pipeline("i2v-A14B", tmp_path_factory.mktemp("m") / "i2v", ["a red circle moves up"])


def pixels(num_frames: int, height: int, width: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, num_frames, height, width, 3), dtype=np.uint8)


def image(frames: np.ndarray, number: int) -> torch.Tensor:
    return torch.from_numpy(frames[:, number]).permute(0, 3, 1, 2).float() / 127.5 - 1.0


@pytest.mark.parametrize(("num_frames", "height", "width"), [(5, 32, 64), (9, 64, 48), (17, 16, 32)])
def test_first_and_last_frame_give_the_pipelines_condition_bit_for_bit(tiny_i2v, num_frames, height, width):
    encoders = load_encoders(tiny_i2v, CPU, torch.float32, with_text=False)
    pipeline: Any = WanImageToVideoPipeline.from_pretrained(tiny_i2v)
    frames = pixels(num_frames, height, width)
    for last in (False, True):
        with torch.no_grad():
            _, theirs = pipeline.prepare_latents(
                image(frames, 0),
                batch_size=1,
                height=height,
                width=width,
                num_frames=num_frames,
                dtype=torch.float32,
                device=CPU,
                last_image=image(frames, -1) if last else None,
            )
        assert torch.equal(encoders.encode_condition(frames, [last]), theirs)
    both = encoders.encode_condition(np.concatenate([frames, frames]), [False, True])
    assert both[0, :4, -1].max() == 0
    # Of the last latent's four frames only the last one is given.
    assert both[1, :4, -1].amax(dim=(1, 2)).tolist() == both[1, :4, -1].amin(dim=(1, 2)).tolist() == [0, 0, 0, 1]


def test_the_first_latent_frame_is_the_pipelines_image_latent_bit_for_bit(tiny_5b):
    encoders = load_encoders(tiny_5b, CPU, torch.float32, with_text=False)
    pipeline: Any = WanImageToVideoPipeline.from_pretrained(tiny_5b)
    frames = pixels(9, 64, 96)
    with torch.no_grad():
        _, theirs, _ = pipeline.prepare_latents(
            image(frames, 0),
            batch_size=1,
            num_channels_latents=48,
            height=64,
            width=96,
            num_frames=9,
            dtype=torch.float32,
            device=CPU,
        )
    assert torch.equal(encoders.encode_video(frames)[:, :, :1], theirs)


class Recorder(torch.nn.Module):
    """Keeps what it is given and predicts zero."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> tuple[torch.Tensor]:
        self.seen = inputs
        return (torch.zeros_like(inputs["hidden_states"]),)


def batch_of(count: int, num_latents: int = 3) -> Batch:
    latents = torch.randn(count, 48, num_latents, 4, 6, generator=torch.Generator().manual_seed(0))
    return Batch(tuple("abcdefgh"[:count]), 0, tuple(range(count)), latents, torch.zeros(count, 512, 8), None)


def test_image_to_video_input_timesteps_and_loss_are_the_pipelines(tiny_5b):
    """The lines of `WanImageToVideoPipeline.__call__` with `expand_timesteps`, on one batch of both kinds."""
    objective = Objective(SigmaSampler(shift=5.0), torch.float32, 11, i2v_probability=0.5)
    batch, recorder = batch_of(8), Recorder()
    given = objective.draw_first_given(batch)
    assert 1 < sum(given) < 7
    terms = objective.loss(recorder, batch)
    noise = objective.draw_noise(batch)
    pipeline: Any = WanImageToVideoPipeline.from_pretrained(tiny_5b)
    with torch.no_grad():
        _, _, mask = pipeline.prepare_latents(
            torch.zeros(1, 3, 64, 96), 1, 48, 64, 96, 9, torch.float32, CPU, torch.Generator()
        )
    for n, is_given in enumerate(given):
        first_frame_mask = mask if is_given else torch.ones_like(mask)
        t = 1000 * terms.sigma[n]
        latents = (1 - terms.sigma[n]) * batch.latents[n : n + 1] + terms.sigma[n] * noise[n : n + 1]
        model_input = (1 - first_frame_mask) * batch.latents[n : n + 1, :, :1] + first_frame_mask * latents
        timestep = (first_frame_mask[0][0][:, ::2, ::2] * t).flatten()
        assert torch.equal(recorder.seen["hidden_states"][n : n + 1], model_input)
        rows = recorder.seen["first_timestep"][n], recorder.seen["timestep"][n]
        assert torch.equal(torch.stack([rows[0]] * 6 + [rows[1]] * 12), timestep)
        squared = (noise[n] - batch.latents[n]) ** 2
        wanted = squared[:, 1:].mean() if is_given else squared.mean()
        torch.testing.assert_close(terms.sample_losses[n], wanted)
    torch.testing.assert_close(terms.loss, terms.sample_losses.mean())


def test_images_and_text_to_video_keep_one_timestep():
    recorder = Recorder()
    for probability, latent_frames in ((1.0, 1), (0.0, 3)):
        objective = Objective(SigmaSampler(shift=5.0), torch.float32, 11, i2v_probability=probability)
        objective.loss(recorder, batch_of(2, latent_frames))
        assert "first_timestep" not in recorder.seen


def test_noise_on_given_first_frames_has_the_official_scale():
    batch, recorder = batch_of(8), Recorder()
    objective = Objective(SigmaSampler(shift=5.0), torch.float32, 11, i2v_probability=1.0, first_frame_noise=True)
    logs = []
    for start in range(0, 400, 8):
        moved = Batch(batch.keys, 0, tuple(range(start, start + 8)), batch.latents, batch.text_embeds, None)
        objective.loss(recorder, moved)
        difference = recorder.seen["hidden_states"][:, :, 0] - batch.latents[:, :, 0]
        logs += difference.flatten(1).std(dim=1).log().tolist()
        assert recorder.seen["first_timestep"].tolist() == [0.0] * 8
    # 400 draws: the mean's standard error is 0.025, the deviation's 0.018; 1152 elements add 0.02 to each logarithm.
    assert abs(np.mean(logs) - FIRST_FRAME_NOISE[0]) < 0.1
    assert abs(np.std(logs) - FIRST_FRAME_NOISE[1]) < 0.08
