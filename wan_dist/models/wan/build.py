"""Writes complete tiny pipelines: the real component classes with a variant's real layout and very few parameters."""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan_dist.core.errors import ModelError
from wan_dist.models.wan.variants import WanVariant, get_variant

DEFAULT_CAPTIONS: tuple[str, ...] = tuple(
    f"a {colour} {shape} moves {direction}"
    for colour in ("red", "green", "blue", "yellow", "magenta", "cyan")
    for shape in ("circle", "square", "triangle")
    for direction in ("to the left", "to the right", "up", "down")
)
"""Captions of the synthetic clips; the tokenizer of a tiny pipeline learns its words from captions."""

MAX_TOKENS = 512
"""Text tokens of every WAN 2.2 variant."""

_TEXT_WIDTH = 64
_SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_WORD_MARK = "▁"
_TINY_VAE_48 = "assets/tiny_vae_48"


def make_tiny_pipeline(
    variant: str, out_dir: Path, captions: Sequence[str] = DEFAULT_CAPTIONS, *, seed: int = 0
) -> Path:
    """Write a diffusers folder that WanPipeline or WanImageToVideoPipeline loads, and return its path.

    Transformers, text encoder and the 16-channel VAE are random; the 48-channel VAE is the trained one that the
    package ships. The same arguments give the same bytes.

    Args:
        variant: official name, such as "ti2v-5B".
        out_dir: folder to make; it may exist when empty.
        captions: what the tokenizer learns its words from. Other words still encode, as characters or bytes.
        seed: seed of every random weight.

    Raises:
        ConfigError: the variant is unknown.
        ModelError: out_dir is in use, or there are no captions.
    """
    spec = get_variant(variant)
    words = [caption.strip() for caption in captions]
    if not any(words):
        raise ModelError(f"{out_dir}: a tiny pipeline needs at least one caption that is not blank.")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ModelError(f"{out_dir} exists and is not an empty folder; choose another or remove it.")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary_dir = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        _write_components(spec, temporary_dir, words, seed)
        temporary_dir.chmod(0o755)  # mkdtemp makes it private to the user
        temporary_dir.replace(out_dir)
    except BaseException:
        shutil.rmtree(temporary_dir, ignore_errors=True)
        raise
    return out_dir


def _write_components(spec: WanVariant, out_dir: Path, captions: Sequence[str], seed: int) -> None:
    """Write every component's folder and model_index.json, each from a seed of its own."""
    tokenizer = train_tokenizer(captions)
    tokenizer.save_pretrained(out_dir / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build_text_encoder(len(tokenizer)).save_pretrained(out_dir / "text_encoder")
        torch.manual_seed(seed + 1)
        build_vae(spec).save_pretrained(out_dir / "vae")
        for index in range(spec.num_transformers):
            torch.manual_seed(seed + 2 + index)
            folder = "transformer" if index == 0 else f"transformer_{index + 1}"
            build_transformer(spec).save_pretrained(out_dir / folder)
    build_scheduler(spec).save_pretrained(out_dir / "scheduler")
    index = json.dumps(_model_index(spec), indent=2, sort_keys=True)
    (out_dir / "model_index.json").write_text(index + "\n", encoding="utf-8")


def _model_index(spec: WanVariant) -> dict[str, object]:
    """Return model_index.json as the official diffusers repositories have it."""
    index: dict[str, object] = {
        "_class_name": "WanImageToVideoPipeline" if spec.needs_condition else "WanPipeline",
        "_diffusers_version": diffusers.__version__,
        "boundary_ratio": spec.boundary,
        "expand_timesteps": spec.per_token_timestep,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if spec.num_transformers == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if spec.needs_condition:
        index |= {"image_encoder": [None, None], "image_processor": [None, None]}
    return index


def build_scheduler(spec: WanVariant) -> UniPCMultistepScheduler:
    """Return the scheduler of the official diffusers repositories with the official repository's flow shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=1000,
        flow_shift=spec.flow_shift,
    )


def train_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a T5-style tokenizer over the captions: <pad> 0, </s> 1, <unk> 2, 256 bytes, then the learned pieces.

    Frequent words are one token each. What the captions do not hold falls back to bytes, so no text becomes <unk>.
    UMT5's own model is Unigram, whose trainer leaves only letters on so little text; BPE merges whole words.

    Args:
        captions: texts to learn from, at least one not blank.
    """
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(_SPECIAL_TOKENS), show_progress=False)
    learner = Tokenizer(models.BPE())
    _set_text_rules(learner)
    # The word mark is given by itself too: an unknown first letter needs it.
    learner.train_from_iterator([*captions, _WORD_MARK], trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    ordered = list(_SPECIAL_TOKENS) + byte_pieces + pieces[len(_SPECIAL_TOKENS) :]
    vocabulary = {piece: index for index, piece in enumerate(ordered)}
    merges = [tuple(pair) for pair in learned["merges"]]
    fast = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    _set_text_rules(fast)
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
        padding_side="right",
        truncation_side="right",
    )


def _set_text_rules(tokenizer: Tokenizer) -> None:
    """Set T5's normaliser, word splitting and decoder on a tokenizer."""
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=_WORD_MARK, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_WORD_MARK, prepend_scheme="always")]
    )


def build_text_encoder(num_tokens: int) -> UMT5EncoderModel:
    """Return a random UMT5 encoder of width 64 and two layers.

    Args:
        num_tokens: size of the vocabulary.
    """
    config = UMT5Config(
        vocab_size=num_tokens,
        d_model=_TEXT_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config).eval()


def build_transformer(spec: WanVariant) -> WanTransformer3DModel:
    """Return a random transformer with the variant's channels and switches, 0.4 to 1.3 M parameters.

    Its width is at least the number of values in a token (192 for ti2v-5B, 64 for A14B): the velocity holds the
    token's noise, which cannot pass a narrower stream. At width 96 the 5B loss stalled at 0.7, at 192 it fell below
    0.35 in the same 300 steps.
    """
    num_heads = 4
    token_size = spec.latent_channels * math.prod(spec.patch_size)
    transformer = WanTransformer3DModel(
        patch_size=spec.patch_size,
        num_attention_heads=num_heads,
        attention_head_dim=max(token_size // num_heads, 24),
        in_channels=spec.in_channels,
        out_channels=spec.out_channels,
        text_dim=_TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=384,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    return transformer.eval()


def build_vae(spec: WanVariant) -> AutoencoderKLWan:
    """Return the shipped 48-channel VAE, or a random 16-channel one, in float32."""
    if spec.latent_channels == 48:
        with resources.as_file(resources.files("wan_dist.models.wan") / _TINY_VAE_48) as path:
            return AutoencoderKLWan.from_pretrained(path, torch_dtype=torch.float32, local_files_only=True)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1).eval()
    mean, std = measure_latents(vae)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return vae


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over smooth random videos.

    A random VAE has no published statistics; with these its normalised latents have about unit variance.
    """
    coarse = torch.rand(16, 3, 3, 4, 4) * 2.0 - 1.0
    videos = nn.functional.interpolate(coarse, size=(9, 64, 64), mode="trilinear")
    posterior = vae.encode(videos, return_dict=False)[0]
    latents = posterior.mode().transpose(0, 1).flatten(1)  # pyright: ignore[reportAttributeAccessIssue]
    return latents.mean(dim=1).tolist(), latents.std(dim=1).clamp(min=1e-3).tolist()
