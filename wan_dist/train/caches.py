"""Which cached families a run reads, after checking that they are what the run would have encoded itself."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from wan_dist.config.schema import TrainConfig
from wan_dist.core.buckets import FIXED_RULES
from wan_dist.core.errors import DataError, UnfitDataError
from wan_dist.data.cached import CachedSamples
from wan_dist.data.family import find_families, open_family, read_fingerprint
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.fingerprint import (
    Kind,
    differences,
    digest_of,
    latent_parts,
    latents_fingerprint,
    text_fingerprint,
    text_identity,
    vae_identity,
)
from wan_dist.data.index import MANIFEST_NAME, ShardSet
from wan_dist.data.stores import LocalStore
from wan_dist.models.wan.variants import WanVariant, get_variant
from wan_dist.parallel.dist import Ranks, from_main

logger = logging.getLogger(__name__)

_KEYS: Final[dict[Kind, str]] = {"latents": "data.latents", "text": "data.text_embeds"}


@dataclass(frozen=True)
class Caches:
    """The families that a run reads.

    Attributes:
        samples: reads them; None if everything is encoded online.
        vae_config: configuration of the VAE that made the latents; None if they are encoded online.
        suffix: what the data's digest gets appended, naming the fingerprints; a run resumes on the same ones only.
    """

    samples: CachedSamples | None
    vae_config: Mapping[str, Any] | None
    suffix: str


def cache_rules(cfg: TrainConfig) -> dict[str, Any]:
    """Return how a configuration turns clips into samples, everything that latents depend on."""
    names = ("sizes", "num_frames", "fps", "frame_choice", "crop", "allow_duplicate_frames", "allow_upscale")
    rules = {name: getattr(cfg.data, name) for name in names}
    return {**rules, "merge_below": cfg.train.global_batch_size if cfg.data.tail == "merge" else None}


def variant_parts(variant: WanVariant, with_last: bool) -> tuple[str, ...]:
    """Return the tensors of a clip's cached latents for a variant; `with_last`: first-last-frame samples occur."""
    return latent_parts(needs_condition=variant.needs_condition, with_last=with_last)


def open_caches(cfg: TrainConfig, shard_sets: Sequence[ShardSet], ranks: Ranks) -> Caches:
    """Return the families to read instead of encoding; collective.

    Rank 0 hashes the model and chooses; the others open what it chose.

    Args:
        cfg: a loaded configuration.
        shard_sets: the data sets.
        ranks: this process's place.
    Raises:
        DataError: a family is unfinished, damaged, or was made from something else; the message names the field.
    """
    chosen = _choose(cfg, shard_sets) if ranks.is_main else None
    folders: dict[Kind, list[Path] | None] = from_main(chosen, ranks)
    families = {kind: [open_family(f, kind) for f in found] if found else None for kind, found in folders.items()}
    suffix = "".join(
        f"-{kind}:{'+'.join(f.manifest.fingerprint_sha256[:16] for f in found)}"
        for kind, found in families.items()
        if found
    )
    for kind, found in folders.items():
        where = ", ".join(map(str, found)) if found else "encoded online"
        logger.info("%s: %s", kind, where)
    latents, text = families["latents"], families["text"]
    if not latents and not text:
        return Caches(None, None, suffix)
    samples = CachedSamples(
        [len(shards.manifest.shards) for shards in shard_sets],
        [FamilyReader(family) for family in latents] if latents else None,
        [FamilyReader(family) for family in text] if text else None,
    )
    return Caches(samples, latents[0].fingerprint["vae"]["config"] if latents else None, suffix)


def _choose(cfg: TrainConfig, shard_sets: Sequence[ShardSet]) -> dict[Kind, list[Path] | None]:
    model = Path(cfg.model.path)
    parts = variant_parts(get_variant(cfg.model.variant), cfg.data.flf2v_probability > 0)
    identities: dict[str, Any] = {}

    def of_model(name: str, identify: Callable[[Path], Any]) -> Any:
        if name not in identities:
            identities[name] = identify(model)
            if identities[name] is None:
                logger.warning("%s has no %s: cached families are not compared with it", model, name)
        return identities[name]

    def latents(shards: ShardSet) -> dict[str, Any]:
        return latents_fingerprint(shards, cache_rules(cfg), of_model("vae", vae_identity), parts)

    def text(shards: ShardSet) -> dict[str, Any]:
        return text_fingerprint(shards, of_model("text_encoder", text_identity), cfg.model.dtype)

    fixed = cfg.data.frame_choice in FIXED_RULES and cfg.data.crop in FIXED_RULES
    if not fixed and cfg.data.latents == "auto":
        logger.info("latents are encoded online: frames or crop are left to chance")
    if fixed and cfg.data.tail == "merge" and len(shard_sets) > 1:
        # A data set cannot be cached alone: its clips' shapes depend on how many the others have.
        fixed = False
        logger.info("latents are encoded online: data.tail = merge sorts the clips of all data sets together")
    return {
        "latents": _folders("latents", cfg.data.latents if fixed else "none", shard_sets, latents),
        # What an embedding run trains lies before the text encoder.
        "text": _folders("text", "none" if cfg.method.kind == "embedding" else cfg.data.text_embeds, shard_sets, text),
    }


def _folders(
    kind: Kind, setting: str, shard_sets: Sequence[ShardSet], wanted: Callable[[ShardSet], dict[str, Any]]
) -> list[Path] | None:
    """Return one family per data set, None to encode online."""
    if setting == "none":
        return None
    if setting != "auto":
        folder = Path(setting)
        open_family(folder, kind)
        _refuse_other(kind, folder, wanted(shard_sets[0]))
        return [folder]
    found = [_find(kind, shards, wanted) for shards in shard_sets]
    folders = [folder for folder in found if folder is not None]
    if folders and len(folders) < len(found):
        without = shard_sets[found.index(None)].name
        raise DataError(
            f"{folders[0]} is cached and {without} is not; run `wan-data cache {without}` too, or set "
            f"{_KEYS[kind]}: none."
        )
    return folders or None


def _find(kind: Kind, shards: ShardSet, wanted: Callable[[ShardSet], dict[str, Any]]) -> Path | None:
    """Return the family of a data set, None if it has none at all."""
    candidates = find_families(shards.folder, kind) if isinstance(shards.store, LocalStore) else []
    if not candidates:
        return None
    fingerprint = wanted(shards)
    made = {candidate: read_fingerprint(candidate) for candidate in candidates}
    fitting = [c for c in candidates if not differences(made[c], fingerprint)]
    if not fitting:
        nearest = min(candidates, key=lambda c: len(differences(made[c], fingerprint)))
        _refuse_other(kind, nearest, fingerprint)
    whole = [c for c in fitting if (c / MANIFEST_NAME).exists()]
    if not whole:
        raise DataError(
            f"{fitting[0]}: caching has not finished there; run `wan-data cache` again, or set {_KEYS[kind]}: none."
        )
    exact = [c for c in whole if digest_of(made[c]) == digest_of(fingerprint)]
    if not exact and len(whole) > 1:
        names = ", ".join(c.name for c in whole)
        raise DataError(f"{shards.name}: {names} fit this run equally well; name one as {_KEYS[kind]}.")
    return (exact or whole)[0]


def _refuse_other(kind: Kind, folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise UnfitDataError if a family was made from something else than `wanted`."""
    found = differences(read_fingerprint(folder), wanted)
    if found:
        raise UnfitDataError(
            f"{folder}: was made from something else than this run uses: {'; '.join(found)}. Run `wan-data cache` "
            f"again with this config, or set {_KEYS[kind]}: none to encode online."
        )
