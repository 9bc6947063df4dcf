"""Floating point operations of the WAN transformer's blocks, a multiply and an add counted as two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NUM_TEXT_TOKENS = 512


@dataclass(frozen=True)
class BlockFlops:
    """Operations of one forward pass through all blocks, for one sample.

    Attributes:
        matmul: of the matrices of weights: projections of self and cross attention, feed-forward.
        attention: of the scores and the weighted sums.
    """

    matmul: float
    attention: float

    @property
    def forward(self) -> float:
        """Operations of a forward pass."""
        return self.matmul + self.attention

    def training(self, *, all_weights: bool) -> float:
        """Return the operations that a training step needs, recomputation not counted.

        Args:
            all_weights: every weight is trained; else (adapters, embeddings) nearly no gradients of weights are
                computed, only those of activations.
        """
        return (3 if all_weights else 2) * self.matmul + 3 * self.attention

    def recomputed(self, checkpointing: str) -> float:
        """Return the operations that gradient checkpointing (none, block, attention) adds to a training step."""
        return {"none": 0.0, "attention": self.matmul, "block": self.forward}[checkpointing]


def block_flops(config: Mapping[str, Any], num_tokens: int) -> BlockFlops:
    """Return the operations of a forward pass for a sample of `num_tokens` tokens.

    With width d, feed-forward width f, L tokens and T text tokens a block takes 12 L d^2 (q, k, v, o; cross q, o),
    4 T d^2 (cross k, v), 4 L d f (feed-forward), 4 L^2 d and 4 L T d (self and cross attention).

    Args:
        config: of a diffusers `WanTransformer3DModel`.
        num_tokens: L.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    layers, inner, text = config["num_layers"], config["ffn_dim"], NUM_TEXT_TOKENS
    matmul = layers * (12 * num_tokens * width**2 + 4 * text * width**2 + 4 * num_tokens * width * inner)
    attention = layers * (4 * num_tokens**2 * width + 4 * num_tokens * text * width)
    return BlockFlops(float(matmul), float(attention))
