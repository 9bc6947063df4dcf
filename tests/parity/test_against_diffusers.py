"""Our inputs and forwards against diffusers' own pipelines, on the tiny pipelines of each variant."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from wan_dist.data.encode import load_encoders
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.models.wan.forward import predict_velocity

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_5b(tmp_path_factory):
    return make_tiny_pipeline("ti2v-5B", tmp_path_factory.mktemp("m") / "5b", ["a red circle moves up"])


@pytest.fixture(scope="module")
def tiny_i2v(tmp_path_factory):
    return make_tiny_pipeline("i2v-A14B", tmp_path_factory.mktemp("m") / "i2v", ["a red circle moves up"])


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (1, 9, 64, 96, 3), dtype=np.uint8)


def test_text_to_video_forward_equals_the_pipelines_per_token_timesteps(tiny_5b):
    pipeline: Any = WanPipeline.from_pretrained(tiny_5b)
    assert pipeline.config.expand_timesteps
    transformer = pipeline.transformer.eval()
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 48, 3, 4, 6, generator=generator)
    text = torch.randn(2, 512, transformer.config.text_dim, generator=generator)
    timestep = torch.tensor([731.25, 12.5])
    with torch.no_grad():
        ours = predict_velocity(transformer, noisy, timestep, text, None)
        tokens = 3 * 2 * 3
        per_token = timestep[:, None].expand(2, tokens)
        theirs = transformer(hidden_states=noisy, timestep=per_token, encoder_hidden_states=text, return_dict=False)[0]
    # fp32; the same operations on tensors that are broadcast in one and expanded in the other.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_text_embeddings_equal_the_pipelines(tiny_5b):
    encoders = load_encoders(tiny_5b, CPU, torch.float32)
    prompts = ["a red  circle &amp; moves up", "", "unseen words Ünï"]
    pipeline = WanPipeline.from_pretrained(tiny_5b)
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = encoders.encode_prompts(prompts)
    assert torch.equal(ours, theirs)
    assert ours.shape == (3, 512, pipeline.transformer.config.text_dim)
    lengths = [len(pipeline.tokenizer(p).input_ids) for p in ("a red circle & moves up", prompts[1], prompts[2])]
    for embeds, length in zip(ours, lengths, strict=True):
        assert embeds[:length].abs().sum(dim=1).min() > 0
        assert embeds[length:].abs().max() == 0


def test_latents_are_the_normalised_posterior_mean(tiny_5b, frames):
    encoders = load_encoders(tiny_5b, CPU, torch.float32)
    pipeline = WanPipeline.from_pretrained(tiny_5b)
    video = pipeline.video_processor.preprocess_video(
        torch.from_numpy(frames[0]).permute(0, 3, 1, 2).float() / 255.0, height=64, width=96
    )
    with torch.no_grad():
        raw = pipeline.vae.encode(video).latent_dist.mean
    config = pipeline.vae.config
    mean = torch.tensor(config.latents_mean).view(1, 48, 1, 1, 1)
    std = torch.tensor(config.latents_std).view(1, 48, 1, 1, 1)
    ours = encoders.encode_video(frames)
    assert ours.shape == (1, 48, 3, 4, 6)
    torch.testing.assert_close(ours, (raw - mean) / std, rtol=1e-4, atol=1e-4)


def test_decoding_our_latents_as_the_pipeline_does_gives_the_vaes_reconstruction(tiny_5b, frames):
    encoders = load_encoders(tiny_5b, CPU, torch.float32)
    vae, ours = encoders.vae, encoders.encode_video(frames)
    # The lines of WanPipeline.__call__ after the last step.
    mean = torch.tensor(vae.config.latents_mean).view(1, vae.config.z_dim, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, vae.config.z_dim, 1, 1, 1)
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
    with torch.no_grad():
        theirs = vae.decode(ours / std + mean, return_dict=False)[0]
        direct = vae.decode(vae.encode(video).latent_dist.mode(), return_dict=False)[0]
    torch.testing.assert_close(theirs, direct, rtol=1e-3, atol=1e-3)


def test_image_condition_equals_the_pipelines(tiny_i2v, frames):
    encoders = load_encoders(tiny_i2v, CPU, torch.float32)
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_i2v)
    first = torch.from_numpy(frames[:, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    with torch.no_grad():
        _, theirs = pipeline.prepare_latents(
            first, batch_size=1, height=64, width=96, num_frames=9, dtype=torch.float32, device=CPU
        )
    ours = encoders.encode_condition(frames, [False])
    assert ours.shape == (1, 20, 3, 8, 12)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours[0, :4, 0].min() == 1
    assert ours[0, :4, 1:].max() == 0


def test_image_to_video_input_is_noisy_latents_then_mask_then_condition(tiny_i2v):
    seen = {}

    class Recorder(torch.nn.Module):
        def forward(self, **inputs):
            seen.update(inputs)
            return (inputs["hidden_states"][:, :16],)

    noisy, condition = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 20, 3, 4, 4)
    predict_velocity(Recorder(), noisy, torch.tensor([900.0]), torch.zeros(1, 512, 8), condition)
    assert torch.equal(seen["hidden_states"][:, :16], noisy)
    assert torch.equal(seen["hidden_states"][:, 16:], condition)
