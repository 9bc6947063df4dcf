"""The section `data`: where clips come from and what the model sees of them."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from wan_dist.config.section import Fraction, Section

ShardsName = Annotated[str, Field(min_length=1)]


class DatasetConfig(Section):
    """One data set of a mixture."""

    path: str = Field(min_length=1, description="Folder or URL of its shards.")
    weight: float | None = Field(
        default=None, gt=0, description="Its share of the samples relative to the other weights; null goes by size."
    )
    repeats: float = Field(default=1.0, gt=0, description="How often each of its clips comes per epoch.")
    loss_weight: float = Field(default=1.0, ge=0, description="What the loss of its clips is multiplied by.")
    kind: Literal["train", "prior"] = Field(
        default="train",
        description="prior: its clips are not learned; the target is what the model gives without its adapters.",
    )


class DataConfig(Section):
    """Where clips come from and what the model sees of them."""

    shards: ShardsName | Annotated[list[DatasetConfig], Field(min_length=1)] = Field(
        description="Folder or URL (http, https, s3, gs, hf) written by `wan-data pack`, or a list of data sets."
    )
    sizes: list[tuple[int, int]] = Field(
        min_length=1, description="Spatial buckets as [width_px, height_px]. A clip goes to the nearest aspect ratio."
    )
    num_frames: list[int] = Field(
        min_length=1, description="Temporal buckets, 4n+1 frames. A clip goes to the longest that it fills."
    )
    fps: float = Field(gt=0, description="Frames per second that clips are resampled to.")
    frame_choice: Literal["head", "center", "random", "chunk", "uniform", "native"] = Field(
        default="head",
        description="Which part of a longer clip is used. chunk: one of the parts that lie end to end; uniform: frames "
        "spread over all of it, at another speed; native: consecutive frames at the clip's own rate, from anywhere.",
    )
    crop: Literal["center", "random"] = Field(
        default="center", description="Which part is kept after the cover-resize."
    )
    allow_duplicate_frames: bool = Field(
        default=False, description="Use clips whose frame rate is under 0.9 times `fps` by repeating frames."
    )
    allow_upscale: bool = Field(default=False, description="Use clips that are smaller than their bucket.")
    latents: str = Field(
        default="auto",
        min_length=1,
        description="Cached latents: auto takes what `wan-data cache` left in `shards` and refuses what does not fit; "
        "none encodes online; else the folder of a family.",
    )
    text_embeds: str = Field(
        default="auto", min_length=1, description="Cached text embeddings: auto, none or a folder, as `latents`."
    )
    validation: ShardsName | Annotated[list[DatasetConfig], Field(min_length=1)] | None = Field(
        default=None, description="Held-out shards, as `shards`. A clip that is in both is an error."
    )
    source: Literal["indexed", "stream"] = Field(
        default="indexed",
        description="stream reads tars of other programs from end to end, with looser guarantees (docs/data.md).",
    )
    tail: Literal["carry", "pad", "merge", "drop"] = Field(
        default="carry",
        description="Clips that do not fill a batch: carry into the next epoch, pad with samples of no weight, "
        "merge small buckets into the nearest one, or drop.",
    )
    decode: Literal["process", "thread"] = Field(
        default="process", description="process: a clip that crashes the decoder costs one sample, not the run."
    )
    cache_dir: str | None = Field(
        default=None, min_length=1, description="Local folder that keeps parts of remote shards."
    )
    cache_gib: float = Field(default=100.0, gt=0, description="Size of `cache_dir`, GiB.")
    caption_dropout: Fraction = Field(default=0.1, description="Share of samples trained on the empty prompt.")
    i2v_probability: Fraction = Field(
        default=0.0,
        description="ti2v-5B: share of the videos whose first frame is given; the others are text-to-video.",
    )
    first_frame_noise: bool = Field(
        default=False,
        description="Add noise of scale exp(N(-3.5, 0.5)) to the first frames that i2v_probability gives.",
    )
    flf2v_probability: Fraction = Field(
        default=0.0, description="i2v-A14B: share of the videos whose last frame is given beside the first."
    )
    num_workers: int = Field(default=2, ge=0, description="Threads per rank that read and decode ahead.")
    memory_cache_gib: float = Field(
        default=1.0, ge=0, description="Host memory per rank for encoded latents and text that are used again, GiB."
    )
    max_bad_fraction: Fraction = Field(
        default=0.05, description="Training stops once more than this share of the samples read was unreadable."
    )

    @field_validator("sizes", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: object) -> object:
        # YAML has lists only; strict mode would refuse them for tuples.
        return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value
