"""Tiny pipelines are complete, load in diffusers' own pipelines and come out the same from the same seed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from PIL import Image

from wan_dist.core.errors import ConfigError, ModelError
from wan_dist.models.wan.build import DEFAULT_CAPTIONS, make_tiny_pipeline, train_tokenizer
from wan_dist.models.wan.variants import VARIANTS

PIPELINES = {"ti2v-5B": WanPipeline, "t2v-A14B": WanPipeline, "i2v-A14B": WanImageToVideoPipeline}


@pytest.fixture(scope="module")
def tiny_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny_pipeline(name, root / name) for name in VARIANTS}


def generate(pipeline: Any, **inputs: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0}
    noise = torch.Generator().manual_seed(0)
    return pipeline(prompt="a red circle moves up", output_type="np", generator=noise, **size, **inputs).frames[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_loads_with_its_layout_and_generates(tiny_dirs: dict[str, Path], name: str) -> None:
    variant, pipeline = VARIANTS[name], PIPELINES[name].from_pretrained(tiny_dirs[name])
    transformers = [pipeline.transformer, pipeline.transformer_2][: variant.num_transformers]
    for transformer in transformers:
        assert transformer.config.in_channels == variant.in_channels
        assert transformer.config.out_channels == variant.out_channels
        assert transformer.config.image_dim is None
        assert 200_000 < sum(weight.numel() for weight in transformer.parameters()) < 1_500_000
    assert (pipeline.transformer_2 is None) == (variant.num_transformers == 1)
    assert pipeline.config.boundary_ratio == variant.boundary
    assert pipeline.config.expand_timesteps == variant.per_token_timestep
    assert pipeline.scheduler.config.flow_shift == variant.flow_shift
    assert pipeline.vae.config.z_dim == variant.latent_channels
    strides = (pipeline.vae_scale_factor_temporal, *[pipeline.vae_scale_factor_spatial] * 2)
    assert strides == variant.vae_stride
    frames = generate(pipeline, **({"image": Image.new("RGB", (64, 64))} if variant.needs_condition else {}))
    assert frames.shape == (5, 64, 64, 3)
    assert np.isfinite(frames).all()


def test_5b_folder_also_loads_as_image_to_video(tiny_dirs: dict[str, Path]) -> None:
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_dirs["ti2v-5B"])
    assert generate(pipeline, image=Image.new("RGB", (64, 64), (200, 40, 40))).shape == (5, 64, 64, 3)


def test_two_experts_differ(tiny_dirs: dict[str, Path]) -> None:
    weights = [tiny_dirs["t2v-A14B"] / part / "diffusion_pytorch_model.safetensors" for part in experts_of("t2v-A14B")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


def experts_of(name: str) -> list[str]:
    return ["transformer", "transformer_2"][: VARIANTS[name].num_transformers]


@pytest.mark.parametrize("name", ["ti2v-5B", "i2v-A14B"])
def test_same_seed_gives_the_same_bytes_and_another_does_not(
    tiny_dirs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    again = make_tiny_pipeline(name, tmp_path / "again")
    other = make_tiny_pipeline(name, tmp_path / "other", seed=1)
    assert digests(again) == digests(tiny_dirs[name])
    changed = {path for path, digest in digests(other).items() if digests(again)[path] != digest}
    assert f"{experts_of(name)[0]}/diffusion_pytorch_model.safetensors" in changed


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", VARIANTS)
def test_normalised_latents_have_about_unit_variance(tiny_dirs: dict[str, Path], name: str) -> None:
    vae = PIPELINES[name].from_pretrained(tiny_dirs[name]).vae
    torch.manual_seed(0)
    video = torch.nn.functional.interpolate(torch.rand(8, 3, 2, 4, 4) * 2 - 1, size=(5, 64, 64), mode="trilinear")
    with torch.no_grad():
        latents = vae.encode(video).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    # Other videos than those measured, hence the wide band; unnormalised 16-channel latents lie near 0.1.
    assert 0.3 < ((latents - mean) / std).std().item() < 3.0


def test_tokenizer_pads_ends_and_never_meets_an_unknown(tiny_dirs: dict[str, Path]) -> None:
    tokenizer = PIPELINES["ti2v-5B"].from_pretrained(tiny_dirs["ti2v-5B"]).tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in (DEFAULT_CAPTIONS[0], "Zebra & 火 straße", ""):
        encoded = tokenizer(text, padding="max_length", max_length=512, truncation=True)
        length = sum(encoded["attention_mask"])
        ids = encoded["input_ids"]
        assert len(ids) == 512
        assert ids[length - 1] == 1
        assert set(ids[length:]) <= {0}
        assert 2 not in ids
        assert tokenizer.decode(ids[: length - 1]) == text
    assert len(tokenizer(DEFAULT_CAPTIONS[0])["input_ids"]) == 8  # seven words, one token each, and the end


def test_words_of_given_captions_become_tokens() -> None:
    tokenizer = train_tokenizer(["a walrus naps", "a walrus swims"])
    assert tokenizer.tokenize("a walrus swims") == ["▁a", "▁walrus", "▁swims"]


def test_folder_in_use_and_missing_captions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("kept")
    with pytest.raises(ModelError, match="not an empty folder"):
        make_tiny_pipeline("ti2v-5B", tmp_path / "used")
    assert (tmp_path / "used" / "file").read_text() == "kept"
    for captions in ([], ["  "]):
        with pytest.raises(ModelError, match="caption"):
            make_tiny_pipeline("ti2v-5B", tmp_path / "none", captions)
    with pytest.raises(ConfigError, match="ti2v-5B"):
        make_tiny_pipeline("ti2v-5b", tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["used"]


def test_empty_folder_is_filled_and_nothing_temporary_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    out_dir = make_tiny_pipeline("t2v-A14B", tmp_path / "out")
    assert json.loads((out_dir / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
