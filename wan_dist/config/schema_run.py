"""The sections for what a run keeps and shows: `checkpoint`, `validation`, `samples`, `log`."""

from typing import Literal

from pydantic import Field, create_model, field_validator

from wan_dist.config.section import Section


class ValidationConfig(Section):
    """The loss on `data.validation`."""

    every: int = Field(default=500, gt=0, description="Steps between measurements; there is one after the last step.")
    num_sigmas: int = Field(default=4, gt=0, description="Noise levels per clip and expert, spread evenly.")
    max_clips: int = Field(default=64, gt=0, description="Clips measured at most, the same ones each time.")


class SamplesConfig(Section):
    """Videos drawn while training runs."""

    every: int = Field(default=0, ge=0, description="Steps between them; 0 draws none.")
    prompts: list[str] = Field(default_factory=list, description="What to draw, a video each.")
    prompts_file: str | None = Field(default=None, min_length=1, description="File of further prompts, a line each.")
    images: list[str] = Field(
        default_factory=list, description="First frames, image files; one per prompt, or none for text to video."
    )
    size: tuple[int, int] | None = Field(
        default=None, description="[width, height] in px; null: the first of data.sizes."
    )
    num_frames: int | None = Field(default=None, description="4n+1; null: the first of data.num_frames.")
    num_inference_steps: int | None = Field(default=None, gt=0, description="Denoising steps; null: the official ones.")
    guidance_scale: float | None = Field(default=None, ge=1, description="1 is none; null: the official ones.")
    negative_prompt: str = Field(default="", description="What guidance leads away from.")
    seed: int = Field(default=0, ge=0, description="Seed of the first video's noise; the next ones count up.")
    use_average: bool = Field(default=True, description="Draw with averaged weights where the run keeps some.")

    @field_validator("size", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class _CheckpointFields(Section):
    save_every: int = Field(default=500, ge=0, description="Steps between checkpoints; 0 saves at the end only.")
    keep_last: int = Field(default=3, gt=0, description="Newest checkpoints kept.")
    keep_every: int = Field(default=0, ge=0, description="Steps whose multiples are kept for good; 0 for none.")
    resume: Literal["auto", "require", "never"] = Field(
        default="auto", description="auto continues if a whole checkpoint exists, require fails without one."
    )
    grace_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that a job told to stop may take for its last step, and that its save may stand still.",
    )
    trust: bool = Field(
        default=False, description="Resume a checkpoint that no run of this user wrote. Its shards can run code."
    )


# `async` is a word of Python and cannot be written as an attribute.
_CheckpointWithAsync = create_model(
    "_CheckpointWithAsync",
    __base__=_CheckpointFields,
    **{
        "async": (
            bool,
            Field(default=True, description="Write checkpoints in another process while training goes on."),
        )
    },  # type: ignore[arg-type]
)


class CheckpointConfig(_CheckpointWithAsync):
    """When the run is saved and how it continues."""

    @property
    def asynchronous(self) -> bool:
        """The key `async`."""
        return bool(getattr(self, "async"))


class LogConfig(Section):
    """What is written while training runs."""

    every: int = Field(default=10, gt=0, description="Steps between lines, TensorBoard points and metrics.jsonl rows.")
    tensorboard: bool = Field(default=True, description="Write TensorBoard events into the run folder.")
    wandb_project: str | None = Field(
        default=None, min_length=1, description="Report to this wandb project too; WANDB_MODE=offline keeps it local."
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Peak of one device for MFU, TFLOP/s; null takes a known GPU's bf16 peak.",
    )
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(default="INFO", description="Log level of rank 0.")
