"""Files of trained words, and their way into a pipeline.

ComfyUI takes the tensor `umt5xxl` of a file in `models/embeddings` for WAN's text encoder
(`comfy/text_encoders/wan.py: embedding_key`); the prompt says `embedding:NAME`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wan_dist.adapters.embedding import add_placeholders, expand_prompt
from wan_dist.core.errors import ModelError
from wan_dist.core.finite import is_finite

EMBEDDING_KEY = "umt5xxl"
TOKEN_KEY = "wan_dist.token"
_OTHER_KEYS = ("emb_params",)


@dataclass(frozen=True)
class Word:
    """A trained word.

    Attributes:
        token: how prompts write it.
        vectors: [num_vectors, text width].
    """

    token: str
    vectors: Tensor

    def expand(self, prompt: str) -> str:
        """Return a prompt with the word written as its tokens."""
        return expand_prompt(prompt, self.token, len(self.vectors))


def read_word(path: Path) -> Word:
    """Return the word of a file; one that does not name its token is called by the file's name.

    Raises:
        ModelError: unreadable, or no vectors for WAN's text encoder.
    """
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; correct the path.")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors files are read; pickles (.pt, .bin) can run code.")
    try:
        with safe_open(path, framework="pt") as handle:
            names, metadata = list(handle.keys()), handle.metadata() or {}
            named = [name for name in (EMBEDDING_KEY, *_OTHER_KEYS) if name in names]
            if not named and len(names) != 1:
                raise ModelError(f"{path}: holds {len(names)} tensors and none is called {EMBEDDING_KEY}.")
            name = named[0] if named else names[0]
            vectors = handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as safetensors ({error}).") from None
    vectors = vectors[None] if vectors.dim() == 1 else vectors
    if vectors.dim() != 2 or not vectors.is_floating_point() or not is_finite(vectors):
        raise ModelError(f"{path}: {name} is {list(vectors.shape)} {vectors.dtype}; finite [vectors, width] is needed.")
    own_name = name if name not in (EMBEDDING_KEY, *_OTHER_KEYS) else path.stem
    return Word(metadata.get(TOKEN_KEY, own_name), vectors)


@torch.no_grad()
def add_word(pipeline: Any, word: Word) -> None:
    """Add a word to a pipeline's tokenizer and text encoder; prompts must then go through `Word.expand`.

    Args:
        pipeline: a WAN pipeline of diffusers; changed in place.
        word: the word.

    Raises:
        ModelError: its vectors are of another text encoder, or the tokenizer knows the token already.
    """
    encoder = pipeline.text_encoder
    width = encoder.config.d_model
    if word.vectors.shape[1] != width:
        raise ModelError(f"{word.token}: vectors of width {word.vectors.shape[1]}, the text encoder has {width}.")
    try:
        ids = add_placeholders(pipeline.tokenizer, word.token, len(word.vectors))
    except ValueError as error:
        raise ModelError(f"{error}; choose another token.") from None
    rows = encoder.get_input_embeddings().weight.shape[0]
    if ids[-1] >= rows:  # UMT5 has some rows more than its tokenizer has tokens
        encoder.resize_token_embeddings(ids[-1] + 1, mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table[ids] = word.vectors.to(table)
