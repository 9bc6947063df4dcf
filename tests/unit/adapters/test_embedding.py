"""Textual inversion against diffusers' own pipeline with the word added to its tokenizer and text encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer, UMT5EncoderModel

from wan_dist.adapters.embedding import EmbeddingModel, PromptTokens, expand_prompt, placeholder_tokens
from wan_dist.models.wan.build import make_tiny_pipeline

TOKEN, NUM_VECTORS = "<toy>", 3
PROMPTS = ["a <toy> moves up", "<toy>", "", "a red circle", "a red circle, <toy>, and a <toy>"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_pipeline("t2v-A14B", tmp_path_factory.mktemp("embedding") / "model")


def test_text_embeds_and_gradients_equal_a_pipeline_with_the_word_added(model_dir: Path) -> None:
    tokens = PromptTokens(AutoTokenizer.from_pretrained(model_dir / "tokenizer"), TOKEN, NUM_VECTORS)
    model = EmbeddingModel(UMT5EncoderModel.from_pretrained(model_dir / "text_encoder").eval(), {}, pad_id=0)
    vectors = torch.randn(NUM_VECTORS, 64, generator=torch.Generator().manual_seed(0))
    model.start_from(vectors.clone(), tokens.first_id)
    ids, _ = tokens.encode_prompt(PROMPTS, max_sequence_length=512, device=torch.device("cpu"))
    ours = model.text_embeds(ids)

    pipeline: Any = DiffusionPipeline.from_pretrained(model_dir, transformer=None, transformer_2=None)
    names = placeholder_tokens(TOKEN, NUM_VECTORS)
    PromptTokens(pipeline.tokenizer, TOKEN, NUM_VECTORS)
    rows = pipeline.tokenizer.convert_tokens_to_ids(names)
    encoder = pipeline.text_encoder
    encoder.resize_token_embeddings(max(rows) + 1)
    with torch.no_grad():
        encoder.shared.weight[rows] = vectors
    # The word stands in front where a caption lacks it; the empty prompt is the unconditional one and stays empty.
    written = [p if not p or TOKEN in p else f"{TOKEN} {p}" for p in PROMPTS]
    theirs, _ = pipeline.encode_prompt(
        [expand_prompt(p, TOKEN, NUM_VECTORS) for p in written],
        do_classifier_free_guidance=False,
        max_sequence_length=512,
    )
    assert torch.equal(ours[2], theirs[2])
    # Embeddings of size 3 in fp32, encoded in batches that are laid out alike: the last digits differ.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weights).sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["embedding"]
    (theirs * weights).sum().backward()
    gradient = encoder.shared.weight.grad
    assert gradient is not None
    torch.testing.assert_close(model.embedding.grad, gradient[rows], rtol=1e-4, atol=1e-5)
    assert float(gradient[rows].abs().max()) > 0.01


def test_a_word_that_is_a_token_already_is_refused(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tokenizer")
    with pytest.raises(ValueError, match="already has a token '</s>'"):
        PromptTokens(tokenizer, "</s>", 1)
