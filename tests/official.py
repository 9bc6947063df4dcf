"""Names and shapes of the official transformer, written down from `wan/modules/model.py` of Wan-Video/Wan2.2."""

from wan_dist.models.wan.variants import WanVariant

FREQUENCIES, TEXT_WIDTH, PATCH = 256, 4096, (1, 2, 2)


def official_shapes(spec: WanVariant) -> dict[str, tuple[int, ...]]:
    """Return every tensor of a variant's transformer with its shape."""
    width, ffn = spec.width, spec.ffn_width

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes = {"patch_embedding.weight": (width, spec.in_channels, *PATCH), "patch_embedding.bias": (width,)}
    shapes |= linear("text_embedding.0", width, TEXT_WIDTH) | linear("text_embedding.2", width, width)
    shapes |= linear("time_embedding.0", width, FREQUENCIES) | linear("time_embedding.2", width, width)
    shapes |= linear("time_projection.1", 6 * width, width)
    for number in range(spec.num_layers):
        block = f"blocks.{number}"
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= linear(f"{block}.{attention}.{part}", width, width)
            shapes |= {f"{block}.{attention}.norm_{part}.weight": (width,) for part in "qk"}
        shapes |= {f"{block}.norm3.weight": (width,), f"{block}.norm3.bias": (width,)}  # before cross attention
        shapes |= linear(f"{block}.ffn.0", ffn, width) | linear(f"{block}.ffn.2", width, ffn)
        shapes[f"{block}.modulation"] = (1, 6, width)
    shapes |= linear("head.head", spec.out_channels * 4, width)
    return shapes | {"head.modulation": (1, 2, width)}
