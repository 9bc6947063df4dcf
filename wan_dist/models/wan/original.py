"""The official repository's config.json of a transformer, from diffusers' and back."""

import math
from collections.abc import Mapping
from typing import Any

from wan_dist.core.errors import ModelError
from wan_dist.models.wan.variants import WanVariant, get_variant

_OFFICIAL = {"text_dim": 4096, "patch_size": [1, 2, 2]}


def original_config(config: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """Return config.json as the official repository has it.

    Args:
        config: diffusers' config.json of the transformer.
        variant: official name; gives the kind of model.
    Source: config.json of Wan-AI/Wan2.2-T2V-A14B and the other official repositories; `wan/modules/model.py`, which
    fixes the text width and patch size, so they are written only where a model differs.
    """
    heads, head_width = config["num_attention_heads"], config["attention_head_dim"]
    written = {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": heads * head_width,
        "eps": config.get("eps", 1e-6),
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config.get("freq_dim", 256),
        "in_dim": config["in_channels"],
        "model_type": variant.partition("-")[0],
        "num_heads": heads,
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }
    given = {"text_dim": config.get("text_dim", 4096), "patch_size": list(config.get("patch_size", (1, 2, 2)))}
    return written | {name: value for name, value in given.items() if value != _OFFICIAL[name]}


def diffusers_config(
    shapes: Mapping[str, tuple[int, ...]], variant: str, official: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return diffusers' config.json of a transformer with these weights.

    Args:
        shapes: shape of every tensor by diffusers' names.
        variant: official name.
        official: the official config.json, if there is one; without it heads are 128 wide, as in all official models.

    Raises:
        ModelError: the weights are not of the variant, or contradict the official config.
    """
    spec = get_variant(variant)
    try:
        width, in_channels, *patch = shapes["patch_embedding.weight"]
        num_layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks."))
        config = {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": None,
            "attention_head_dim": width // _num_heads(width, official),
            "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
            "eps": (official or {}).get("eps", 1e-6),
            "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
            "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
            "image_dim": None,
            "in_channels": in_channels,
            "num_attention_heads": _num_heads(width, official),
            "num_layers": num_layers,
            "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
            "patch_size": patch,
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"the weights are not a whole WAN transformer ({error!r} is missing).") from None
    _check_variant(config, spec)
    return config


def _num_heads(width: int, official: Mapping[str, Any] | None) -> int:
    heads = (official or {}).get("num_heads", max(width // 128, 1))
    if width % heads:
        raise ModelError(f"config.json: num_heads = {heads} does not divide the width {width} of the weights.")
    return heads


def _check_variant(config: Mapping[str, Any], spec: WanVariant) -> None:
    found = (config["in_channels"], config["out_channels"])
    if found != (spec.in_channels, spec.out_channels):
        raise ModelError(
            f"the weights have {found[0]}/{found[1]} in/out channels, {spec.name} has "
            f"{spec.in_channels}/{spec.out_channels}; is --variant right?"
        )
