"""From the data section of a configuration to opened shards, their order, and one rank's batches."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wan_dist.config.schema import TrainConfig
from wan_dist.config.schema_data import DatasetConfig
from wan_dist.core.order import SampleOrder
from wan_dist.data.assign import ClipRules
from wan_dist.data.batching import ClipBatches
from wan_dist.data.clips import ClipDataset
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.encode import Encoders, load_encoders
from wan_dist.data.index import open_shards
from wan_dist.data.mixture import ShardSource, check_held_out
from wan_dist.data.stores import CacheLimits
from wan_dist.data.stream import ClipStream
from wan_dist.data.stream_batches import StreamBatches
from wan_dist.models.wan.variants import get_variant
from wan_dist.parallel.dist import Ranks
from wan_dist.train.caches import open_caches
from wan_dist.train.embedding import prompt_tokens

logger = logging.getLogger(__name__)

_WINDOW_SHARDS = 64

Batches = ClipBatches | StreamBatches


def open_dataset(cfg: TrainConfig) -> ClipDataset:
    """Return the training clips of a configuration, sorted into buckets.

    Raises:
        DataError: the shards are damaged or unfinished, no clip fits, or a validation clip is among them.
    """
    dataset = _open(cfg, cfg.data.shards)
    if cfg.data.tail == "merge":
        dataset.merge_small_buckets(cfg.train.global_batch_size)
    if cfg.data.validation:
        held_out = [open_shards(source.path, source.cache) for source in _sources(cfg, cfg.data.validation)]
        check_held_out(dataset.shard_sets, held_out)
        logger.info("held out: %d clips", sum(shards.manifest.num_clips for shards in held_out))
    return dataset


def open_validation(cfg: TrainConfig) -> ClipDataset | None:
    """Return the held-out clips of a configuration, sorted into the same buckets; None if it names none."""
    return _open(cfg, cfg.data.validation) if cfg.data.validation else None


def sample_order(cfg: TrainConfig, dataset: ClipDataset) -> SampleOrder:
    """Return the order in which a configuration trains on its clips; its block is one optimizer step."""
    tail = "carry" if cfg.data.tail == "merge" else cfg.data.tail
    return dataset.order(cfg.train.global_batch_size, _WINDOW_SHARDS, cfg.train.seed, tail)


def open_batches(cfg: TrainConfig, ranks: Ranks, dtype: torch.dtype) -> tuple[Batches, str]:
    """Return this rank's batches and the digest of the data, the rules that shape it and the caches; collective.

    Args:
        cfg: a loaded configuration.
        ranks: this process's place.
        dtype: dtype in which the text encoder computes.
    """
    data = cfg.data
    with_condition = get_variant(cfg.model.variant).needs_condition
    if data.source == "stream":
        stream = ClipStream(
            [source.path for source in _sources(cfg, data.shards)], _rules(cfg), open_decoder(data.decode)
        )
        batches: Batches = StreamBatches(
            stream,
            open_encoders(cfg, ranks, dtype, vae_config=None, with_text=True),
            with_condition=with_condition,
            rank=ranks.data_rank,
            world_size=ranks.data_world_size,
            block_size=cfg.train.global_batch_size,
            micro_batch_size=cfg.train.micro_batch_size,
            seed=cfg.train.seed,
            caption_dropout=data.caption_dropout,
            max_bad_fraction=data.max_bad_fraction,
            flf2v_probability=data.flf2v_probability,
        )
        return batches, stream.digest
    dataset = open_dataset(cfg)
    order = sample_order(cfg, dataset)
    caches = open_caches(cfg, dataset.shard_sets, ranks)
    has_text = caches.samples is not None and caches.samples.has_text
    encoders = open_encoders(cfg, ranks, dtype, vae_config=caches.vae_config, with_text=not has_text)
    batches = ClipBatches(
        dataset,
        encoders,
        order,
        with_condition=with_condition,
        rank=ranks.data_rank,
        world_size=ranks.data_world_size,
        micro_batch_size=cfg.train.micro_batch_size,
        seed=cfg.train.seed,
        caption_dropout=data.caption_dropout,
        num_workers=data.num_workers,
        cache_bytes=int(data.memory_cache_gib * 2**30),
        max_bad_fraction=data.max_bad_fraction,
        cached=caches.samples,
        flf2v_probability=data.flf2v_probability,
        with_masks=cfg.flow.mask_min_weight < 1.0,
    )
    tail = "" if data.tail in ("carry", "merge") else f"-{data.tail}"
    return batches, f"{dataset.digest}{tail}{caches.suffix}"


def open_encoders(
    cfg: TrainConfig, ranks: Ranks, dtype: torch.dtype, *, vae_config: Mapping[str, Any] | None, with_text: bool
) -> Encoders:
    """Return what encodes clips and captions; an embedding run's captions stay token ids until the transformer."""
    model, is_embedding = Path(cfg.model.path), cfg.method.kind == "embedding"
    encoders = load_encoders(
        model, ranks.device, dtype, vae_config=vae_config, with_text=with_text and not is_embedding
    )
    return dataclasses.replace(encoders, text_pipeline=prompt_tokens(cfg)) if is_embedding else encoders


def _open(cfg: TrainConfig, shards: str | Sequence[DatasetConfig]) -> ClipDataset:
    data = cfg.data
    return ClipDataset.open(
        _sources(cfg, shards),
        sizes=data.sizes,
        num_frames=data.num_frames,
        fps=data.fps,
        frame_choice=data.frame_choice,
        crop=data.crop,
        allow_duplicate_frames=data.allow_duplicate_frames,
        allow_upscale=data.allow_upscale,
        decoder=open_decoder(data.decode),
    )


def _rules(cfg: TrainConfig) -> ClipRules:
    data = cfg.data
    return ClipRules(
        sizes=tuple(data.sizes),
        num_frames=tuple(data.num_frames),
        fps=data.fps,
        frame_choice=data.frame_choice,
        crop=data.crop,
        allow_duplicate_frames=data.allow_duplicate_frames,
        allow_upscale=data.allow_upscale,
    )


def _sources(cfg: TrainConfig, shards: str | Sequence[DatasetConfig]) -> list[ShardSource]:
    data = cfg.data
    cache = CacheLimits(Path(data.cache_dir), int(data.cache_gib * 2**30)) if data.cache_dir else None
    named = [DatasetConfig(path=shards)] if isinstance(shards, str) else shards
    return [ShardSource(d.path, d.weight, d.repeats, d.loss_weight, cache, d.kind) for d in named]
