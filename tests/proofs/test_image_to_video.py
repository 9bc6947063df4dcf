"""Clips of one caption, told apart by their given frames alone; diffusers' image-to-video must give each back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from tests.proofs.lessons import Lesson, blended, cosine, farthest_pair, make_lesson, train_and_export

pytestmark = pytest.mark.proof

CAPTION = "a shape moves"
STEPS_5B = 700


@pytest.fixture(scope="module")
def lesson_5b(tmp_path_factory):
    return make_lesson(
        tmp_path_factory.mktemp("5b"), "ti2v-5B", 64, [CAPTION, CAPTION], lambda vae: farthest_pair(vae, 64)
    )


def sampled(pipeline: Any, lesson: Lesson, clip: str, seed: int, prompt: str = CAPTION, **given: Any) -> torch.Tensor:
    """Latents after the first latent frame, which may be given."""
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt=prompt,
        height=lesson.side,
        width=lesson.side,
        num_frames=9,
        num_inference_steps=25,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
        image=Image.fromarray(lesson.frames[clip][0]),
        **given,
    ).frames
    return frames[:, :, 1:]


def similarities_5b(lesson: Lesson, folder: Path, breakage: str) -> dict[tuple[str, str], float]:
    """Cosine of the sample from each clip's first frame with each clip's latents, given frame left out."""
    export = train_and_export(
        lesson, folder, breakage, STEPS_5B, model={"variant": "ti2v-5B"}, data={"i2v_probability": 0.9}
    )
    pipeline: Any = WanImageToVideoPipeline.from_pretrained(export)
    assert pipeline.scheduler.config.flow_shift == 5.0
    found = {}
    for seed, clip in enumerate(lesson.latents):
        sample = sampled(pipeline, lesson, clip, seed)
        for other, latents in lesson.latents.items():
            found[clip, other] = cosine(sample, latents[:, :, 1:])
    print(breakage, found)
    return found


def memorised(found: dict[tuple[str, str], float]) -> bool:
    return all(cos > 0.95 if asked == clip else abs(cos) < 0.4 for (asked, clip), cos in found.items())


def test_each_first_frame_gives_its_clip_back(lesson_5b, tmp_path):
    found = similarities_5b(lesson_5b, tmp_path, "none")
    assert memorised(found), found


@pytest.mark.parametrize("breakage", ["first frame late"])
def test_a_broken_first_frame_is_noticed(lesson_5b, tmp_path, breakage):
    found = similarities_5b(lesson_5b, tmp_path, breakage)
    assert not memorised(found), found


OTHER_CAPTION = "it moves elsewhere"
STEPS_A14B = 1000


@pytest.fixture(scope="module")
def lesson_a14b(tmp_path_factory):
    """Two clips of one caption; a third begins as the first, ends otherwise and has another caption."""
    captions = [CAPTION, CAPTION, OTHER_CAPTION]
    ends = [(0, 1), (2, 3), (0, 4)]
    return make_lesson(tmp_path_factory.mktemp("a14b"), "i2v-A14B", 32, captions, lambda _: blended(32, 0, ends))


def similarities_a14b(lesson: Lesson, folder: Path, breakage: str) -> dict[tuple[str, str, str], float]:
    """Cosine of the samples, given first or first and last frames, with each clip's latents; first frame left out.

    What all clips have in common is taken off: it tells nothing.
    """
    export = train_and_export(
        lesson,
        folder,
        breakage,
        STEPS_A14B,
        model={"variant": "i2v-A14B", "expert": "both"},
        data={"flf2v_probability": 0.5, "caption_dropout": 0.5},
    )
    pipeline: Any = WanImageToVideoPipeline.from_pretrained(export)
    assert (pipeline.scheduler.config.flow_shift, pipeline.config.boundary_ratio) == (5.0, 0.9)
    common = torch.cat(list(lesson.latents.values())).mean(dim=0, keepdim=True)[:, :, 1:]
    found = {}
    # By the first frame alone where the caption is the same; by the last frame alone where there is no caption.
    asked = [("first", CAPTION, "clip0"), ("first", CAPTION, "clip1"), ("first", OTHER_CAPTION, "clip2")]
    asked += [("both", "", clip) for clip in ("clip0", "clip1", "clip2")]
    for seed, (kind, prompt, clip) in enumerate(asked):
        last = {"last_image": Image.fromarray(lesson.frames[clip][-1])} if kind == "both" else {}
        sample = sampled(pipeline, lesson, clip, seed, prompt=prompt, **last)
        for other, latents in lesson.latents.items():
            found[kind, clip, other] = cosine(sample - common, latents[:, :, 1:] - common)
    print(breakage, found)
    return found


def memorised_a14b(found: dict[tuple[str, str, str], float]) -> bool:
    return all(cos > 0.95 if asked == clip else cos < 0.2 for (_, asked, clip), cos in found.items())


def test_first_and_last_frames_give_their_clips_back(lesson_a14b, tmp_path):
    found = similarities_a14b(lesson_a14b, tmp_path, "none")
    assert memorised_a14b(found), found


@pytest.mark.parametrize("breakage", ["mask inverted"])
def test_a_broken_mask_is_noticed(lesson_a14b, tmp_path, breakage):
    found = similarities_a14b(lesson_a14b, tmp_path, breakage)
    assert not memorised_a14b(found), found
