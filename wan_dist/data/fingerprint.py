"""What shaped a cached family: every weight, rule and library that its content depends on.

A fingerprint is a JSON object and not only its hash, so that a mismatch can say which field differs. What is left out
on purpose: the number of clips per pass, since it moves results by less than bf16 holds, and paths.
"""

import hashlib
import importlib.metadata
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Literal

import av

from wan_dist.core.errors import ModelError
from wan_dist.core.hashing import sha256_of
from wan_dist.data.decode import DECODE_RULES
from wan_dist.data.encode import MAX_TEXT_TOKENS
from wan_dist.data.index import ShardSet

FORMAT_VERSION: Final = 1
"""Counted up when the same fingerprint would be written as other bytes."""

Kind = Literal["latents", "text"]

_MEDIA_FIELDS: Final = (
    "key",
    "media_ext",
    "media_size",
    "media_crc32",
    "mask_size",
    "mask_crc32",
    "width",
    "height",
    "num_frames",
    "fps",
)
_CAPTION_FIELDS: Final = ("key", "json_size", "json_crc32")
_MAX_SHOWN: Final = 40


def digest_of(fingerprint: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a fingerprint's canonical JSON, hexadecimal."""
    text = json.dumps(fingerprint, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def latents_fingerprint(
    shards: ShardSet,
    rules: Mapping[str, Any],
    vae: Mapping[str, Any] | None,
    parts: Sequence[str],
    tiling: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what latents depend on.

    Args:
        shards: the clips.
        rules: how they become samples, as JSON values.
        vae: `vae_identity` of the model; None if it is not there to be compared.
        parts: tensors of each sample, see `latent_parts`.
        tiling: tile sizes in px of a tiled encoding, None without.
    """
    return {
        "kind": "latents",
        "format": FORMAT_VERSION,
        "clips_sha256": _index_digest(shards, _MEDIA_FIELDS),
        "rules": json.loads(json.dumps(rules)),
        "decoder": {"rules": DECODE_RULES, "av": av.__version__, "ffmpeg": av.ffmpeg_version_info},
        "vae": None if vae is None else {**vae, "dtype": "fp32", "tiling": dict(tiling) if tiling else None},
        "parts": list(parts),
        "stored": "posterior mean, not normalised, bf16",
    }


def text_fingerprint(shards: ShardSet, text: Mapping[str, Any] | None, dtype: str) -> dict[str, Any]:
    """Return what text embeddings depend on.

    Args:
        shards: the captions.
        text: `text_identity` of the model; None if it is not there to be compared.
        dtype: dtype in which the text encoder computes, "bf16" or "fp32".
    """
    return {
        "kind": "text",
        "format": FORMAT_VERSION,
        "captions_sha256": _index_digest(shards, _CAPTION_FIELDS),
        "encoder": None if text is None else {**text, "dtype": dtype},
        "max_tokens": MAX_TEXT_TOKENS,
        "cleaning": {"rules": "diffusers WanPipeline", "ftfy": importlib.metadata.version("ftfy")},
        "stored": "last hidden state, trimmed to its true length, bf16",
    }


def latent_parts(*, needs_condition: bool, with_last: bool = False) -> tuple[str, ...]:
    """Return the tensors that a sample's latents consist of, by what the variant is told about given frames.

    latents: the clip; its VAE is causal, so that the first latent frame is the first frame encoded alone, which is all
    that ti2v-5B needs. condition: the first frame and zeros, for i2v-A14B. condition_last: with the last frame too.
    """
    if not needs_condition:
        return ("latents",)
    return ("latents", "condition", "condition_last") if with_last else ("latents", "condition")


def vae_identity(model_dir: Path) -> dict[str, Any] | None:
    """Return hash and whole configuration of a pipeline's VAE, None if the folder has none.

    Raises:
        ModelError: it is not readable.
    """
    folder = model_dir / "vae"
    if not folder.is_dir():
        return None
    from diffusers import AutoencoderKLWan

    # A value that is left out of the file means the class's default, which is part of what it computes.
    parameters = inspect.signature(AutoencoderKLWan.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {"weights_sha256": _weights_digest(folder), "config": json.loads(json.dumps(defaults)) | _config(folder)}


def text_identity(model_dir: Path) -> dict[str, Any] | None:
    """Return hashes and configuration of a pipeline's text encoder and tokenizer, None if the folder has none.

    Raises:
        ModelError: they are not readable.
    """
    encoder, tokenizer = model_dir / "text_encoder", model_dir / "tokenizer"
    if not (encoder.is_dir() and tokenizer.is_dir()):
        return None
    return {
        "weights_sha256": _weights_digest(encoder),
        "config": _config(encoder),
        "tokenizer_sha256": _files_digest(sorted(p for p in tokenizer.iterdir() if p.is_file())),
    }


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return, one text per field, where a family's fingerprint differs from that of a run.

    What is null for the run (its model folder has no VAE) is not compared, and tiling is the family's own choice:
    training never encodes with tiles. More tensors per sample than the run wants do no harm.
    """
    return [
        f"{name} was {_shown(ours)} and is {_shown(theirs)}"
        for name, ours, theirs in _pairs(made, wanted, "")
        if ours != theirs
        and not name.startswith("vae.tiling")
        and not (name == "parts" and ours and theirs and set(theirs) <= set(ours))
    ]


def _pairs(made: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*made, *wanted}):
        ours, theirs = made.get(key), wanted.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            yield from _pairs(ours, theirs, f"{prefix}{key}.")
        elif theirs is not None or not isinstance(ours, Mapping):
            yield f"{prefix}{key}", ours, theirs


def _shown(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _index_digest(shards: ShardSet, fields: Sequence[str]) -> str:
    """Return the SHA-256 over some fields of every sample, and over which shard holds it at which place."""
    digest = hashlib.sha256()
    for number in range(len(shards.manifest.shards)):
        rows = shards.index(number)
        digest.update(f"{number} {len(rows)}\n".encode())
        for field in fields:
            digest.update(rows[field].tobytes())
    return digest.hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); download the model again.") from None
    # Names with an underscore say who wrote the file and where it lay.
    return {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}


def _weights_digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no .safetensors file; give a diffusers folder with safetensors weights.")
    return _files_digest(files)


def _files_digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 over names and hashes; files are hashed side by side, 11 GB of text encoder among them."""
    try:
        with ThreadPoolExecutor(4, "hash") as pool:
            content = [[path.name, digest] for path, digest in zip(files, pool.map(sha256_of, files), strict=True)]
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read ({error.strerror}).") from None
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
