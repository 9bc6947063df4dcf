"""The training configuration: strict pydantic models, one section per concern, every unit named.

`load.py` turns a YAML file and command line overrides into `TrainConfig`. Only builders read these objects;
inner code takes plain arguments.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from wan_dist.config.schema_data import DataConfig
from wan_dist.config.schema_run import CheckpointConfig, LogConfig, SamplesConfig, ValidationConfig
from wan_dist.config.section import Fraction, Section

CONFIG_VERSION = 1

VariantName = Literal["ti2v-5B", "t2v-A14B", "i2v-A14B"]
ExpertName = Literal["high_noise", "low_noise"]
ComponentName = Literal["transformer", "high_noise", "low_noise"]
LoraTargets = Literal["attention", "blocks", "all"]


class ModelConfig(Section):
    """Which weights are trained."""

    path: str = Field(min_length=1, description="Diffusers folder of the pipeline. Local path.")
    variant: VariantName = Field(description="Official name of the WAN 2.2 variant.")
    expert: ExpertName | Literal["both"] | None = Field(
        default=None,
        description="Expert of an A14B variant that this job trains; both trains the two in one job, each with its own "
        "optimizer, on the steps that are drawn for it; null for ti2v-5B.",
    )
    dtype: Literal["bf16", "fp32"] = Field(
        default="bf16", description="Compute dtype of the transformer. Masters and optimizer state are fp32."
    )
    base_dtype: Literal["fp8", "nf4"] | None = Field(
        default=None,
        description="lora, embedding: how the frozen weights of the blocks are stored; computed with in `dtype`. nf4 "
        "needs bitsandbytes. With parallel.zero_stage 0 to 2; null stores them in `dtype`.",
    )


class MethodConfig(Section):
    """What of the model is trained."""

    kind: Literal["full", "lora", "embedding"] = Field(
        default="full",
        description="full: every transformer weight. lora: low-rank adapters. embedding: textual inversion, vectors of "
        "a new word of the text encoder.",
    )
    rank: int = Field(default=32, gt=0, description="lora: rank of the adapters.")
    alpha: float | None = Field(
        default=None, gt=0, description="lora: the adapters' output is scaled by alpha / rank; null takes the rank."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="lora: dropout of the adapters' input.")
    targets: LoraTargets | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        default="blocks",
        description="lora: attention (q, k, v, o), blocks (attention and feed-forward), all (every linear layer), or a "
        "list of regular expressions, each of which must match whole names such as blocks.0.attn1.to_q.",
    )
    rslora: bool = Field(default=False, description="lora: scale by alpha / sqrt(rank).")
    dora: bool = Field(default=False, description="lora: train the weights' magnitudes too (DoRA).")
    init_from: dict[ComponentName, Annotated[str, Field(min_length=1)]] = Field(
        default_factory=dict,
        description="lora: adapters to continue from, a file for transformer, high_noise or low_noise, in any format.",
    )
    token: str = Field(
        default="<concept>",
        pattern=r"^\S+$",
        description="embedding: the new word. A caption that lacks it gets it in front.",
    )
    num_vectors: int = Field(default=4, gt=0, le=64, description="embedding: vectors that the new word stands for.")
    init_text: str = Field(
        default="", description="embedding: words whose vectors the new ones start from; empty takes the mean vector."
    )


class FlowConfig(Section):
    """How noise levels are drawn and what the loss is. Maths: `wan_dist.core.flow_matching`, `wan_dist.core.losses`."""

    shift: Literal["auto", "resolution"] | Annotated[float, Field(gt=0)] = Field(
        default="auto",
        description="Flow shift; auto is the variant's official value (5, 12 or 5); resolution: by a clip's tokens.",
    )
    shift_rule: Literal["sqrt", "linear", "exponential"] = Field(
        default="sqrt",
        description="For shift resolution. sqrt: SD3's, through the official shift at the official size; linear and "
        "exponential: diffusers' and Flux's, through `shift_points`.",
    )
    shift_points: list[tuple[int, float]] | None = Field(
        default=None,
        description="[tokens, shift] pairs of `shift_rule`: one for sqrt (null: the official one), two for the others.",
    )
    sampling: Literal["uniform", "logit_normal", "mode", "sigmoid", "beta"] = Field(
        default="uniform", description="Distribution of u in [0, 1] before the shift."
    )
    logit_mean: float = Field(default=0.0, description="Mean of logit(u), for logit_normal.")
    logit_std: float = Field(default=1.0, gt=0, description="Standard deviation of logit(u), for logit_normal.")
    loss: Literal["mse", "huber", "mae"] = Field(
        default="mse", description="How the predicted velocity's difference from the target is measured, in fp32."
    )
    huber_delta: float = Field(
        default=1.0, gt=0, description="Difference from which the Huber loss grows linearly instead of squared."
    )
    weighting: Literal["none", "sigma_sqrt", "cosmap", "bell"] = Field(
        default="none", description="Weight of a sample by its noise level (docs/training.md)."
    )
    mask_min_weight: Fraction = Field(
        default=0.1, description="Weight in the loss of what a clip's mask leaves out; 1 does not read masks."
    )
    sigmoid_scale: float = Field(default=1.0, gt=0, description="u = sigmoid(scale x unit normal), for sigmoid.")
    mode_scale: float = Field(
        default=1.29, description="SD3's scale, for mode: -1 to 1.75; above 0 the middle is drawn more often."
    )
    beta_alpha: float = Field(default=0.6, ge=0.1, le=100, description="First parameter of the beta distribution.")
    beta_beta: float = Field(default=0.6, ge=0.1, le=100, description="Second parameter of the beta distribution.")
    t_min: Fraction = Field(default=0.0, description="Lowest sigma drawn, by truncation of the distribution.")
    t_max: Fraction = Field(default=1.0, description="Highest sigma drawn, likewise.")

    @field_validator("shift_points", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: object) -> object:
        return [tuple(v) if isinstance(v, list) else v for v in value] if isinstance(value, list) else value


class OptimConfig(Section):
    """Optimizer and learning rate schedule."""

    name: Literal["adamw", "adamw_8bit", "adafactor", "lion", "prodigy", "schedule_free", "muon"] = Field(
        default="adamw", description="Optimizer; docs/training.md says which works with which ZeRO stage."
    )
    lr: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="Adam's decay rates.")
    eps: float = Field(default=1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay.")
    expert_lr: dict[ExpertName, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="Peak learning rate of an expert where it is not `lr`."
    )
    decay: Literal["all", "matrices"] = Field(
        default="all", description="What decays; matrices leaves out biases, norms and modulation tables."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further keyword arguments of the optimizer's class."
    )
    schedule: Literal["constant", "linear", "cosine", "cosine_restarts", "rex", "wsd"] = Field(
        default="constant", description="Course of the learning rate after the warm-up (docs/training.md)."
    )
    num_cycles: int = Field(default=1, gt=0, description="Falls from the peak, for cosine_restarts.")
    decay_share: float = Field(
        default=0.1, gt=0, le=1, description="Share of the steps after the warm-up in which wsd falls."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up from 0.")
    min_lr_ratio: Fraction = Field(default=0.0, description="Share of `lr` that every schedule but constant falls to.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Global gradient norm limit; 0 turns clipping off.")

    @field_validator("betas", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value


class LoopConfig(Section):
    """Length and batch of the training loop."""

    num_steps: int = Field(gt=0, description="Optimizer steps of the whole run.")
    global_batch_size: int = Field(default=1, gt=0, description="Clips per optimizer step, over all ranks.")
    micro_batch_size: int = Field(default=1, gt=0, description="Clips per forward pass on one rank.")
    gradient_checkpointing: Literal["none", "block", "attention"] = Field(
        default="block",
        description="block: keep each block's input and recompute the rest. attention: keep attention outputs too.",
    )
    offload_hidden_states: bool = Field(
        default=False, description="Keep the blocks' inputs in host memory until the backward pass."
    )
    attention: Literal["auto", "sdpa", "flash", "cudnn"] = Field(
        default="auto", description="Attention kernel: auto is torch's choice, flash the flash-attn package."
    )
    compile: bool = Field(default=False, description="Compile the transformer's blocks with torch.compile.")
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="Running average of the weights, for example 0.999; 0 keeps none."
    )
    ema_device: Literal["device", "cpu"] = Field(default="device", description="Where the running average lives.")
    max_skipped_steps: int = Field(
        default=10,
        gt=0,
        description="Training stops after this many steps in a row with a non-finite loss or gradient.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sample order, noise, sigma, crops and dropout.")


class ParallelConfig(Section):
    """DeepSpeed ZeRO and its memory options."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=3,
        description="What the ranks partition: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights.",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(default="none", description="Where optimizer states live.")
    offload_param: Literal["none", "cpu"] = Field(default="none", description="Where partitioned weights live.")
    sequence_parallel: int = Field(
        default=1, gt=0, description="Neighbouring ranks that share each sample's tokens (Ulysses). Divides the heads."
    )
    timeout_s: float = Field(default=1800.0, gt=0, description="Seconds after which a stuck collective ends the job.")
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Further DeepSpeed keys. One that wan_dist sets itself is an error."
    )


class TrainConfig(Section):
    """One training run."""

    version: Literal[1] = Field(default=CONFIG_VERSION, description="Version of this format.")
    run_dir: str = Field(min_length=1, description="Run folder: checkpoints, metrics, resolved config.")
    model: ModelConfig
    method: MethodConfig = MethodConfig()
    data: DataConfig
    flow: FlowConfig = FlowConfig()
    optim: OptimConfig = OptimConfig()
    train: LoopConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainConfig":
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size = {self.train.micro_batch_size}"
            )
        return self
