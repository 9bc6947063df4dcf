"""Two timesteps per sample, for a given first frame, without a modulation table per token.

ti2v-5B's image-to-video marks the given first frame by timestep 0 on its tokens, and diffusers' forward takes a
timestep per token for it: every block then makes a [B, L, 6, D] fp32 tensor of shifts, scales and gates (2 GB at
27,280 tokens) although it holds two different rows. Here the two rows are computed, and each block lays them over the
tokens by a view [B, chunks, L / chunks, D] whose chunks lie inside one latent frame: same numbers, no copies.

Source: `WanTransformer3DModel.forward` and `WanTransformerBlock.forward` of diffusers, whose order of operations and
dtypes this follows; `tests/parity/test_compact.py` compares outputs and gradients.
"""

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor


def bind_compact(transformer: Any) -> None:
    """Let a `WanTransformer3DModel` and its blocks take `first_timestep`; without it they are diffusers' own.

    Args:
        transformer: the model; its parameters, names and files stay as they are.
    """
    transformer.forward = MethodType(_forward, transformer)
    for block in transformer.blocks:
        block.forward = MethodType(_block_forward, block)


def _forward(
    self: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    *,
    first_timestep: Tensor | None = None,
    first_token: int = 0,
    **options: Any,
) -> Any:
    """Return what diffusers' forward returns for a timestep per token.

    Args:
        self: the transformer.
        hidden_states: [B, C, f, h, w].
        timestep: [B] fp32, of all tokens or of those after the first latent frame.
        encoder_hidden_states: [B, 512, D].
        first_timestep: [B] fp32, of the first latent frame's tokens; None leaves everything to diffusers.
        first_token: number of the first token that the blocks of this process see, where they see a part of them.
        options: of diffusers' forward; with `first_timestep` only `return_dict=False`.
    """
    if first_timestep is None:
        return type(self).forward(self, hidden_states, timestep, encoder_hidden_states, **options)
    assert options == {"return_dict": False}, options
    latent_shape = hidden_states.shape
    per_frame = math.prod(
        size // patch for size, patch in zip(latent_shape[3:], self.config.patch_size[1:], strict=True)
    )
    rotary = self.rope(hidden_states)
    hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
    rows = torch.stack([first_timestep, timestep], dim=1)
    temb, modulation, text, _ = self.condition_embedder(
        rows.flatten(), encoder_hidden_states, None, timestep_seq_len=rows.shape[1]
    )
    modulation = modulation.unflatten(2, (6, -1))  # [B, 2, 6, D]
    place = (per_frame, first_token)
    checkpointed = torch.is_grad_enabled() and self.gradient_checkpointing
    for block in self.blocks:
        arguments = (hidden_states, text, modulation, rotary, place)
        hidden_states = self._gradient_checkpointing_func(block, *arguments) if checkpointed else block(*arguments)
    # The output is modulated where all tokens are: parts, if there are any, come together behind `proj_out`.
    shift, scale = _laid_out(self.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2), hidden_states.shape[1], place)
    hidden_states = _modulated(self.norm_out(hidden_states.float()), shift, scale).type_as(hidden_states)
    return (_unpatched(self.proj_out(hidden_states), latent_shape, self.config.patch_size),)


def _block_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    place: tuple[int, int] | None = None,
) -> Tensor:
    """Return what a block of diffusers returns, [B, L, D].

    Args:
        self: the block.
        hidden_states: [B, L, D].
        encoder_hidden_states: [B, 512, D].
        temb: [B, 2, 6, D], of the first latent frame and of the others; without `place` as diffusers takes it.
        rotary_emb: tables of the rotary embedding.
        place: tokens per latent frame, and the number of the first of these L tokens among all.
    """
    if place is None:
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = _laid_out(
        self.scale_shift_table.unsqueeze(0) + temb.float(), hidden_states.shape[1], place
    )
    normed = _modulated(self.norm1(hidden_states.float()), shift, scale).type_as(hidden_states)
    attended = self.attn1(normed, None, None, rotary_emb)
    hidden_states = (hidden_states.float() + _times(attended, gate)).type_as(hidden_states)
    normed = self.norm2(hidden_states.float()).type_as(hidden_states)
    hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)
    normed = _modulated(self.norm3(hidden_states.float()), ffn_shift, ffn_scale).type_as(hidden_states)
    return (hidden_states.float() + _times(self.ffn(normed).float(), ffn_gate)).type_as(hidden_states)


def _laid_out(rows: Tensor, num_tokens: int, place: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return each column of modulation for consecutive chunks of equal length, [B, chunks, 1, D].

    Args:
        rows: [B, 2, columns, D], of the first latent frame and of the others.
        num_tokens: tokens that the chunks make up.
        place: tokens per latent frame, and the number of the first token.
    """
    per_frame, first_token = place
    # No chunk crosses from the first frame into the second, wherever the part of the tokens begins.
    length = math.gcd(per_frame, num_tokens, first_token)
    chunks = num_tokens // length
    num_first = min(max(per_frame - first_token, 0) // length, chunks)
    laid = torch.cat([rows[:, :1].expand(-1, num_first, -1, -1), rows[:, 1:].expand(-1, chunks - num_first, -1, -1)], 1)
    return laid.unsqueeze(2).unbind(3)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift, [B, L, D]."""
    return (x.unflatten(1, (scale.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def _times(x: Tensor, gate: Tensor) -> Tensor:
    """Return x * gate, [B, L, D]."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


def _unpatched(tokens: Tensor, latent_shape: torch.Size, patch: tuple[int, int, int]) -> Tensor:
    """Return the tokens' patches side by side, [B, C, f, h, w].

    Args:
        tokens: [B, L, pt * ph * pw * C].
        latent_shape: [B, *, f, h, w].
        patch: (pt, ph, pw).
    """
    grid = [size // p for size, p in zip(latent_shape[2:], patch, strict=True)]
    x = tokens.reshape(latent_shape[0], *grid, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
