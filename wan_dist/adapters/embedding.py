"""Textual inversion on UMT5: vectors of a new word, trained through the frozen text encoder and transformers.

Source: Textual Inversion, arXiv:2208.01618. A word of several vectors is written as diffusers writes it
(`TextualInversionLoaderMixin.maybe_convert_prompt`): `token token_1 token_2 …`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PARAMETER_NAME = "embedding"
MAX_TOKENS = 512


def placeholder_tokens(token: str, num_vectors: int) -> list[str]:
    """Return the tokens that stand for the vectors of a word, in their order."""
    return [token, *(f"{token}_{number}" for number in range(1, num_vectors))]


def add_placeholders(tokenizer: Any, token: str, num_vectors: int) -> list[int]:
    """Add the tokens of a new word to a tokenizer and return their ids, one after the other.

    Args:
        tokenizer: of the pipeline; changed in place.
        token: the word.
        num_vectors: vectors that it stands for.
    Raises:
        ValueError: the tokenizer knows one of them already.
    """
    from tokenizers import AddedToken

    names = placeholder_tokens(token, num_vectors)
    known = tokenizer.get_vocab()
    if taken := [name for name in names if name in known]:
        raise ValueError(f"the tokenizer already has a token {taken[0]!r}")
    # Whitespace around them would otherwise become tokens of its own between the vectors.
    tokenizer.add_tokens([AddedToken(name, lstrip=True, rstrip=True, normalized=False) for name in names])
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def expand_prompt(prompt: str, token: str, num_vectors: int) -> str:
    """Return a prompt with the word written as all of its tokens."""
    return prompt.replace(token, " ".join(placeholder_tokens(token, num_vectors)))


class PromptTokens:
    """Stands where a text pipeline does and gives token ids instead of embeddings."""

    def __init__(self, tokenizer: Any, token: str, num_vectors: int) -> None:
        """Add the word to the tokenizer.

        Args:
            tokenizer: of the pipeline; changed in place.
            token: the word; a caption that lacks it gets it in front.
            num_vectors: vectors that it stands for.
        """
        self._tokenizer, self._token, self._num_vectors = tokenizer, token, num_vectors
        self.first_id = add_placeholders(tokenizer, token, num_vectors)[0]

    def encode_prompt(
        self, prompts: Sequence[str], *, max_sequence_length: int, device: torch.device, **_options: Any
    ) -> tuple[Tensor, None]:
        """Return token ids, [B, 512] int64 on the device, padded as WanPipeline pads.

        Source: `WanPipeline._get_t5_prompt_embeds` of diffusers.
        """
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        texts = [expand_prompt(self._with_token(prompt_clean(p)), self._token, self._num_vectors) for p in prompts]
        encoded = self._tokenizer(
            texts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
        )
        return encoded.input_ids.to(device), None

    def _with_token(self, prompt: str) -> str:
        # The empty prompt stands for no condition at all and stays empty.
        return prompt if not prompt or self._token in prompt else f"{self._token} {prompt}"


class EmbeddingModel(nn.Module):
    """A frozen text encoder and transformers; what is trained is `embedding`, [num_vectors, width]."""

    def __init__(self, text_encoder: nn.Module, transformers: dict[str, nn.Module], *, pad_id: int) -> None:
        """Keep the parts; `embedding` is set afterwards.

        Args:
            text_encoder: transformers `UMT5EncoderModel`.
            transformers: by expert.
            pad_id: token id that fills a prompt up.
        """
        super().__init__()
        self.text_encoder = text_encoder
        self.transformers = nn.ModuleDict(transformers)
        self.pad_id = pad_id
        self.first_id = 0
        self.embedding: nn.Parameter

    def start_from(self, vectors: Tensor, first_id: int) -> None:
        """Freeze the parts and begin with these vectors.

        Args:
            vectors: [num_vectors, width].
            first_id: token id of the first of them; the others follow.
        """
        self.requires_grad_(False)
        self.first_id = first_id
        self.embedding = nn.Parameter(vectors)

    def text_embeds(self, token_ids: Tensor) -> Tensor:
        """Return text embeddings, [B, 512, width], zero after each prompt's true length.

        Args:
            token_ids: [B, 512] int64.
        """
        encoder: Any = self.text_encoder
        is_new = (token_ids >= self.first_id) & (token_ids < self.first_id + len(self.embedding))
        known = encoder.shared(token_ids.masked_fill(is_new, 0))
        new = self.embedding[(token_ids - self.first_id).clamp(0, len(self.embedding) - 1)]
        vectors = torch.where(is_new[..., None], new.to(known.dtype), known)
        mask = token_ids != self.pad_id
        encoded = encoder(inputs_embeds=vectors, attention_mask=mask.long()).last_hidden_state
        return encoded * mask[..., None].to(encoded.dtype)

    def forward(self, *, encoder_hidden_states: Tensor, expert: str, **inputs: Any) -> Any:
        """Return what one transformer predicts.

        Args:
            encoder_hidden_states: token ids, [B, 512] int64.
            expert: which transformer.
            **inputs: its other inputs.
        """
        embeds = self.text_embeds(encoder_hidden_states)
        return self.transformers[expert](encoder_hidden_states=embeds, **inputs)
