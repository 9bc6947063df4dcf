"""The engine of an embedding run: text encoder and transformers frozen in one model."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_dist.adapters.embedding import EmbeddingModel, PromptTokens
from wan_dist.adapters.frozen_base import quantise_blocks
from wan_dist.config.schema import TrainConfig
from wan_dist.core.errors import ConfigError, ModelError
from wan_dist.models.wan.transformer import empty_transformer, read_transformer_config
from wan_dist.models.wan.variants import WanVariant
from wan_dist.parallel.dist import Ranks
from wan_dist.parallel.load import build_model, fill, gather_in_blocks, tensor_files
from wan_dist.train.blocks import Context
from wan_dist.train.engines import DTYPES, component_of, initialize, prepare_blocks
from wan_dist.train.experts import expert_names

COMPONENT = "embedding"
_TEXT_WEIGHTS = "model"
_SHARED = "shared.weight"
_CHUNK_ROWS = 8192


def prompt_tokens(cfg: TrainConfig) -> PromptTokens:
    """Return what turns captions into token ids with the new word among them.

    Raises:
        ConfigError: the word is a token already.
        ModelError: the tokenizer cannot be loaded.
    """
    try:
        return PromptTokens(_tokenizer(cfg), cfg.method.token, cfg.method.num_vectors)
    except ValueError as error:
        raise ConfigError(f"method.token = {cfg.method.token}: {error}; choose another word.") from None


def build_embedding_engine(
    cfg: TrainConfig, variant: WanVariant, ds_config: dict[str, Any], ranks: Ranks
) -> dict[str, tuple[Any, Any, Context]]:
    """Return engine, forward and context of each expert; the engine trains the vectors of a word, which all share."""
    root, names = Path(cfg.model.path), expert_names(cfg, variant)
    configs = {name: read_transformer_config(root / component_of(name), variant) for name in names}
    tokens = prompt_tokens(cfg)
    pad_id = _tokenizer(cfg).pad_token_id

    def build() -> EmbeddingModel:
        transformers = {name: empty_transformer(config) for name, config in configs.items()}
        return EmbeddingModel(_empty_text_encoder(root / "text_encoder"), transformers, pad_id=pad_id)

    dtype = DTYPES[cfg.model.dtype]
    model: Any = build_model(build, ds_config, dtype)
    fill(model.text_encoder, root / "text_encoder", _TEXT_WEIGHTS)
    for name in names:
        fill(model.transformers[name], root / component_of(name))
    model.start_from(_first_vectors(cfg, root / "text_encoder").to(dtype), tokens.first_id)
    if cfg.model.base_dtype:
        for name in names:
            quantise_blocks(model.transformers[name], cfg.model.base_dtype, ranks.device)
    if cfg.parallel.zero_stage == 3:
        gather_in_blocks([model.transformers[names[0]].blocks[0], model.text_encoder.encoder.block[0]], model)
    model.to(ranks.device)
    model.train()
    model.text_encoder.eval()  # its dropout is no part of what the transformers were trained on
    contexts = {name: prepare_blocks(cfg, model.transformers[name], ranks) for name in names}
    engine = initialize(cfg, model, ds_config, ranks, what=f"{root}: {cfg.method.token}")
    return {name: (engine, partial(engine, expert=name), contexts[name]) for name in names}


def _tokenizer(cfg: TrainConfig) -> Any:
    from transformers import AutoTokenizer

    folder = Path(cfg.model.path) / "tokenizer"
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({str(error).splitlines()[0]}).") from None


def _empty_text_encoder(folder: Path) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = UMT5EncoderModel(UMT5Config.from_pretrained(str(folder), local_files_only=True))
    model.encoder.embed_tokens = model.shared
    return model


def _first_vectors(cfg: TrainConfig, folder: Path) -> Tensor:
    """Return [num_vectors, width] fp32: those of `init_text`, repeated as needed, or the vocabulary's mean."""
    from safetensors import safe_open

    count = cfg.method.num_vectors
    with safe_open(tensor_files(folder, _TEXT_WEIGHTS)[_SHARED], framework="pt") as handle:
        rows = handle.get_slice(_SHARED)
        if cfg.method.init_text:
            ids = _tokenizer(cfg)(cfg.method.init_text, add_special_tokens=False).input_ids
            found = torch.cat([rows[i : i + 1] for i in ids]).float()
            return found[torch.arange(count) % len(found)].contiguous()
        num_rows, width = rows.get_shape()
        total = torch.zeros(width, dtype=torch.float64)
        for start in range(0, num_rows, _CHUNK_ROWS):
            total += rows[start : start + _CHUNK_ROWS].double().sum(0)
    return (total / num_rows).float().repeat(count, 1)
