"""Names of WAN's tensors and modules: diffusers' and the original repository's, each from the other.

ComfyUI's single files use the original names, with or without the prefix `model.diffusion_model.`.
Source: `wan/modules/model.py` of Wan-Video/Wan2.2; diffusers `scripts/convert_wan_to_diffusers.py` and
`loaders/single_file_utils.py: convert_wan_transformer_to_diffusers`, against which the tests compare.
"""

import re

COMFYUI_PREFIX = "model.diffusion_model."

_OUTER = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_ATTENTION = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_INNER = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm1": "norm1",
    "norm2": "norm3",  # diffusers numbers the norms by their order of use, the original code by that of creation
    "norm3": "norm2",
    "scale_shift_table": "modulation",
}
_OUTER_BACK = {theirs: ours for ours, theirs in _OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in _INNER.items()}
_BARE = ("scale_shift_table", "modulation")
_BLOCK = re.compile(r"blocks\.(0|[1-9]\d*)\.(.+)")
_FLAT_BLOCK = re.compile(r"blocks_(0|[1-9]\d*)_(.+)")

# The modules whose weight is a matrix (or a convolution) that a low-rank change can be added to.
_LINEAR_OUTER = {name for name in _OUTER if name != "scale_shift_table"}
_LINEAR_INNER = {name for name in _INNER if "norm" not in name and name not in _BARE}


def module_to_original(module: str) -> str | None:
    """Return the original name of a module that diffusers calls `module`, None if WAN has no such module."""
    return _module(module, _OUTER, _INNER)


def module_to_diffusers(module: str) -> str | None:
    """Return diffusers' name of a module that the original code calls `module`, None if WAN has no such module."""
    return _module(module, _OUTER_BACK, _INNER_BACK)


def tensor_to_original(name: str) -> str | None:
    """Return the original name of a tensor that diffusers calls `name`, None if WAN has no such tensor."""
    return _tensor(name, _OUTER, _INNER)


def tensor_to_diffusers(name: str) -> str | None:
    """Return diffusers' name of a tensor that the original code calls `name`, None if WAN has no such tensor.

    Args:
        name: original name, without ComfyUI's prefix.
    """
    return _tensor(name, _OUTER_BACK, _INNER_BACK)


def flat_to_diffusers(flat: str) -> str | None:
    """Return diffusers' name of a module whose name in either naming was written with `_` for every `.`.

    kohya's LoRA files write modules so, as in `blocks_0_self_attn_q`.
    """
    match = _FLAT_BLOCK.fullmatch(flat)
    if match:
        inner = _FLAT_INNER.get(match.group(2))
        return f"blocks.{match.group(1)}.{inner}" if inner else None
    return _FLAT_OUTER.get(flat)


def takes_lora(module: str) -> bool:
    """Return whether a module, by diffusers' name, has a weight that a low-rank change can be added to."""
    match = _BLOCK.fullmatch(module)
    return match.group(2) in _LINEAR_INNER if match else module in _LINEAR_OUTER


def _module(name: str, outer: dict[str, str], inner: dict[str, str]) -> str | None:
    match = _BLOCK.fullmatch(name)
    if match:
        found = inner.get(match.group(2))
        return f"blocks.{match.group(1)}.{found}" if found else None
    return outer.get(name)


def _tensor(name: str, outer: dict[str, str], inner: dict[str, str]) -> str | None:
    if name.endswith(_BARE):
        return _module(name, outer, inner)
    module, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    found = _module(module, outer, inner)
    return f"{found}.{kind}" if found and not found.endswith(_BARE) else None


def _flattened(names: dict[str, str]) -> dict[str, str]:
    flat = {ours.replace(".", "_"): ours for ours in names}
    return flat | {theirs.replace(".", "_"): ours for ours, theirs in names.items()}


# norm2 and norm3 mean each other in the two namings; no LoRA has norms, and a flat name could be either.
_FLAT_OUTER = {flat: name for flat, name in _flattened(_OUTER).items() if name in _LINEAR_OUTER}
_FLAT_INNER = {flat: name for flat, name in _flattened(_INNER).items() if name in _LINEAR_INNER}
