"""The trainer teaches two clips to a tiny model; diffusers' own sampler must give each back for its caption.

This fails if the velocity's sign, the timestep's scale, the shift or the normalisation is wrong, which is shown by
breaking each once.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from tests.proofs.lessons import (
    Lesson,
    blended,
    cosine,
    farthest_pair,
    make_lesson,
    run_wan_dist,
    train,
    train_and_export,
)

pytestmark = pytest.mark.proof

CAPTIONS = ("a red circle moves up", "a blue square moves to the left")
NUM_STEPS = 700


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    """Two clips whose latents have nothing in common, their shards and a tiny pipeline."""
    folder = tmp_path_factory.mktemp("memorisation")
    made = make_lesson(folder, "ti2v-5B", 64, CAPTIONS, lambda vae: farthest_pair(vae, 64))
    assert abs(cosine(*made.latents.values())) < 0.2
    return made


def _similarity(lesson: Lesson, pipeline: Any) -> dict[tuple[str, str], float]:
    """Cosine of each caption's sample with each clip's latents."""
    pipeline.set_progress_bar_config(disable=True)
    truth = dict(zip(CAPTIONS, (lesson.latents[f"clip{n}"] for n in range(2)), strict=True))
    similarity = {}
    for seed, caption in enumerate(CAPTIONS):
        sample = pipeline(
            caption,
            width=lesson.side,
            height=lesson.side,
            num_frames=9,
            num_inference_steps=25,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).frames
        for other in CAPTIONS:
            similarity[caption, other] = cosine(sample, truth[other])
    return similarity


def _memorise(lesson: Lesson, folder: Path, breakage: str, *, alone: bool = False) -> dict[tuple[str, str], float]:
    """Train, consolidate, sample; return the cosine of each caption's sample with each clip's latents."""
    model = {"variant": "ti2v-5B"}
    export = train_and_export(lesson, folder, breakage, NUM_STEPS, alone=alone, model=model)
    pipeline: Any = WanPipeline.from_pretrained(export)
    assert pipeline.scheduler.config.flow_shift == 5.0
    similarity = _similarity(lesson, pipeline)
    print(breakage, similarity)
    return similarity


def _memorised(similarity: dict[tuple[str, str], float]) -> bool:
    return all(cos > 0.95 if asked == clip else abs(cos) < 0.2 for (asked, clip), cos in similarity.items())


def test_each_caption_gives_its_clip_back(lesson, tmp_path):
    similarity = _memorise(lesson, tmp_path, "none")
    assert _memorised(similarity), similarity


BREAKAGES = ("velocity sign", "timestep scale", "shift applied backwards", "normalisation")


@pytest.fixture(scope="module")
def broken(lesson, tmp_path_factory):
    """What each broken formula learned: the same samples on one rank each, two at a time."""
    folders = [tmp_path_factory.mktemp("broken") for _ in BREAKAGES]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda folder, breakage: _memorise(lesson, folder, breakage, alone=True), folders, BREAKAGES)
        return dict(zip(BREAKAGES, found, strict=True))


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_formula_is_noticed(broken, breakage):
    assert not _memorised(broken[breakage]), broken[breakage]


STEPS_BOTH, STEPS_LORA = 900, 700


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Two clips, and a pipeline whose two experts learned them in one job."""
    folder = tmp_path_factory.mktemp("both")
    made = make_lesson(folder, "t2v-A14B", 32, CAPTIONS, lambda _: blended(32, 0, [(0, 1), (2, 3)]))
    run = folder / "job"
    run.mkdir()
    return made, train_and_export(made, run, "none", STEPS_BOTH, model={"variant": "t2v-A14B", "expert": "both"})


def _told_apart(found: dict[tuple[str, str], float], between: float) -> bool:
    """Whether each sample is its clip, and as unlike the other clip as the clips are."""
    return all(cos > 0.95 if asked == clip else cos < between + 0.15 for (asked, clip), cos in found.items())


def test_both_experts_give_the_clips_back_and_swapped_ones_do_not(both):
    made, export = both
    pipeline: Any = WanPipeline.from_pretrained(export)
    assert (pipeline.scheduler.config.flow_shift, pipeline.config.boundary_ratio) == (12.0, 0.875)
    between = cosine(*made.latents.values())
    right = _similarity(made, pipeline)
    pipeline.transformer, pipeline.transformer_2 = pipeline.transformer_2, pipeline.transformer
    swapped = _similarity(made, pipeline)
    print("both experts", right, "swapped", swapped, "the clips themselves", between)
    assert _told_apart(right, between), right
    assert not _told_apart(swapped, between), swapped


def test_loras_of_both_experts_teach_other_clips_through_diffusers(both, tmp_path):
    _, base = both
    ends = [(4, 5), (6, 7)]
    made = make_lesson(tmp_path, "t2v-A14B", 32, CAPTIONS, lambda _: blended(32, 0, ends))
    between = cosine(*made.latents.values())
    # alpha is not the rank: a loader that takes the scale for 1 would give half of the change.
    run = train(
        replace(made, model=base),
        tmp_path,
        "none",
        STEPS_LORA,
        model={"variant": "t2v-A14B", "expert": "both"},
        method={"kind": "lora", "rank": 16, "alpha": 32.0, "targets": "all"},
    )
    run_wan_dist("lora", "export", str(run), str(tmp_path / "lora.safetensors"), "--format", "diffusers")
    pipeline: Any = WanPipeline.from_pretrained(base)
    before = _similarity(made, pipeline)
    pipeline.load_lora_weights(tmp_path / "lora_high_noise.safetensors")
    pipeline.load_lora_weights(tmp_path / "lora_low_noise.safetensors", load_into_transformer_2=True)
    similarity = _similarity(made, pipeline)
    print("lora", similarity, "without", before, "the clips themselves", between)
    assert _told_apart(similarity, between), similarity
    assert not _told_apart(before, between), before
