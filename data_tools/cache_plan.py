"""From the options of `wan-data cache` to the families that are to be written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wan_dist.config.load import load_config
from wan_dist.core.buckets import FIXED_RULES
from wan_dist.core.errors import ConfigError, ModelError
from wan_dist.data.cache import FamilyPlan, read_done
from wan_dist.data.clips import ClipDataset
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.fingerprint import (
    digest_of,
    latents_fingerprint,
    text_fingerprint,
    text_identity,
    vae_identity,
)
from wan_dist.data.index import ShardSet, open_shards
from wan_dist.models.wan.variants import VARIANTS, WanVariant, get_variant
from wan_dist.train.caches import cache_rules, variant_parts

TILES: Final = {
    "tile_sample_min_height": 256,
    "tile_sample_min_width": 256,
    "tile_sample_stride_height": 192,
    "tile_sample_stride_width": 192,
}
"""Tiles of `--tiling`, px; diffusers' defaults, stated because they shape the content."""

_BYTES: Final = 2


@dataclass(frozen=True)
class CacheRules:
    """What to encode and how.

    Attributes:
        variant: the variant that will be trained; None for text alone.
        dataset: how clips become samples, see `wan_dist.train.caches.cache_rules`.
        dtype: dtype of the text encoder, "bf16" or "fp32".
        with_last: i2v-A14B's condition on first and last frame is wanted too.
    """

    variant: WanVariant | None
    dataset: dict[str, Any]
    dtype: str
    with_last: bool = False


@dataclass(frozen=True)
class CachePlan:
    """Everything that a rank needs to know.

    Attributes:
        latents: family of latents, None if only text is wanted.
        text: family of text embeddings, None if only latents are wanted.
        dataset: the clips in their buckets, None if only text is wanted.
        parts: tensors of a clip's latents.
    """

    latents: FamilyPlan | None
    text: FamilyPlan | None
    dataset: ClipDataset | None
    parts: tuple[str, ...]

    @property
    def families(self) -> list[FamilyPlan]:
        """The families to be written, the quick one first."""
        return [plan for plan in (self.text, self.latents) if plan is not None]


def rules_from_config(config: Path, overrides: Sequence[str]) -> tuple[CacheRules, str]:
    """Return the rules of a training config, and its model folder."""
    cfg = load_config(config, list(overrides))
    with_last = cfg.data.flf2v_probability > 0
    return CacheRules(get_variant(cfg.model.variant), cache_rules(cfg), cfg.model.dtype, with_last), cfg.model.path


def rules_from_options(
    variant: str | None, sizes: Sequence[str], num_frames: Sequence[int], fps: float | None, others: Mapping[str, Any]
) -> CacheRules:
    """Return the rules that are given one by one.

    Args:
        variant: official name.
        sizes: such as "832x480".
        num_frames: frames of the temporal buckets.
        fps: frames per second.
        others: `dtype`, and further keyword arguments of `ClipDataset.open`.
    Raises:
        ConfigError: a size is not WIDTHxHEIGHT, or only some of the rules are given.
    """
    spatial = []
    for size in sizes:
        width, _, height = size.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise ConfigError(f"--size {size}: give WIDTHxHEIGHT in px, such as 832x480.")
        spatial.append((int(width), int(height)))
    dataset = {"sizes": spatial, "num_frames": list(num_frames), "fps": fps, "merge_below": None}
    dataset |= {k: v for k, v in others.items() if k != "dtype"}
    return CacheRules(get_variant(variant) if variant else None, dataset, others["dtype"])


def make_plan(shards_dir: Path, model: Path, rules: CacheRules, *, only: str | None, tiling: bool) -> CachePlan:
    """Return the families of these clips, this model and these rules.

    Raises:
        ConfigError: a rule is missing, or leaves frames or crop to chance.
        WanDistError: the shards or the model cannot be used.
    """
    shards = open_shards(shards_dir)
    text = None if only == "latents" else _text_plan(shards, model, rules)
    if only == "text":
        return CachePlan(None, text, None, ())
    dataset, parts = _check_latent_rules(shards_dir, rules)
    vae = vae_identity(model)
    if vae is None:
        raise ModelError(f"{model}: has no vae folder; give the diffusers folder of the whole pipeline.")
    fingerprint = latents_fingerprint(shards, rules.dataset, vae, parts, TILES if tiling else None)
    return CachePlan(FamilyPlan.of(shards, fingerprint), text, dataset, parts)


def _text_plan(shards: ShardSet, model: Path, rules: CacheRules) -> FamilyPlan:
    text = text_identity(model)
    if text is None:
        raise ModelError(
            f"{model}: has no text_encoder and tokenizer; give the diffusers folder of the whole pipeline."
        )
    return FamilyPlan.of(shards, text_fingerprint(shards, text, rules.dtype))


def _check_latent_rules(shards_dir: Path, rules: CacheRules) -> tuple[ClipDataset, tuple[str, ...]]:
    given = rules.dataset
    if rules.variant is None or not given["sizes"] or not given["num_frames"] or given["fps"] is None:
        raise ConfigError(
            "latents depend on how clips become samples: give --config TRAIN.yaml, or --variant, --size, --num-frames "
            f"and --fps; or --only text. Variants: {', '.join(VARIANTS)}."
        )
    for name in ("frame_choice", "crop"):
        if given[name] not in FIXED_RULES:
            raise ConfigError(
                f"data.{name} = {given[name]} shows other pixels on every visit, which cannot be cached as latents; "
                f"use {' or '.join(FIXED_RULES)}, or cache the text alone with --only text."
            )
    names = [name for name in given if name != "merge_below"]
    dataset = ClipDataset.open(shards_dir, **{n: given[n] for n in names}, decoder=open_decoder("process"))
    if given["merge_below"]:
        dataset.merge_small_buckets(given["merge_below"])
    return dataset, variant_parts(rules.variant, rules.with_last)


def estimate_bytes(plan: CachePlan, variant: WanVariant) -> int:
    """Return the size of the latents that will be written, bytes."""
    if plan.dataset is None:
        return 0
    step_t, step_y, step_x = variant.vae_stride
    total = 0
    for bucket, count in zip(plan.dataset.buckets, plan.dataset.counts.sum(0), strict=True):
        frame = variant.latent_channels * (bucket.height // step_y) * (bucket.width // step_x) * _BYTES
        num_frames = (bucket.num_frames - 1) // step_t + 1
        total += int(count) * frame * num_frames * len(plan.parts)
    return total


def describe(plan: FamilyPlan) -> dict[str, Any]:
    """Return what a family is and how far it is, as JSON values."""
    return {
        "kind": plan.kind,
        "folder": str(plan.folder),
        "fingerprint": digest_of(plan.fingerprint),
        "num_shards": plan.num_shards,
        "finished_shards": sum(read_done(plan, number) is not None for number in range(plan.num_shards)),
    }
