"""A trained word goes out of a checkpoint and into a pipeline, which then computes what training did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.checkpoints import write_run
from wan_dist.adapters.embedding import EmbeddingModel, PromptTokens
from wan_dist.adapters.embedding_files import add_word, read_word
from wan_dist.cli.embedding import app
from wan_dist.core.errors import CheckpointError, ModelError
from wan_dist.models.wan.build import make_tiny_pipeline

TOKEN = "<fox>"
PROMPT = "a <fox> moves to the left, the <fox> is red"


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return make_tiny_pipeline("ti2v-5B", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def vectors() -> torch.Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def exported(folder: Path, model: Path, vectors: torch.Tensor) -> Path:
    method = {"kind": "embedding", "token": TOKEN, "num_vectors": 3}
    components = {"embedding": {"embedding": vectors, "unused": torch.ones(1)}}
    run = write_run(folder / "run", components, method=method, variant="ti2v-5B", model_path=model)
    return app_export(run.parent)


def app_export(folder: Path) -> Path:
    words = ["export", str(folder / "run"), str(folder / "fox.safetensors")]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    return folder / "fox.safetensors"


def load(model: Path) -> Any:
    return WanPipeline.from_pretrained(str(model), local_files_only=True)


@torch.no_grad()
def test_the_pipeline_encodes_prompts_as_training_did(model: Path, vectors: torch.Tensor, tmp_path: Path) -> None:
    trained = load(model)
    prompts = PromptTokens(trained.tokenizer, TOKEN, 3)
    ids, _ = prompts.encode_prompt([PROMPT, ""], max_sequence_length=512, device=torch.device("cpu"))
    holder = EmbeddingModel(trained.text_encoder, {}, pad_id=trained.tokenizer.pad_token_id)
    holder.start_from(vectors, prompts.first_id)
    wanted = holder.text_embeds(ids)
    assert int(((ids >= prompts.first_id) & (ids < prompts.first_id + 3)).sum()) == 6

    pipeline = load(model)
    plain = pipeline.encode_prompt([PROMPT, ""], do_classifier_free_guidance=False, max_sequence_length=512)[0]
    word = read_word(exported(tmp_path, model, vectors))
    add_word(pipeline, word)
    found = pipeline.encode_prompt(
        [word.expand(PROMPT), ""], do_classifier_free_guidance=False, max_sequence_length=512
    )[0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found[0], plain[0], atol=1e-3)
    assert torch.equal(found[1], plain[1])
    with pytest.raises(ModelError, match=r"already has a token '<fox>'; choose another token"):
        add_word(pipeline, word)


def test_the_file_is_what_comfyui_looks_for(model: Path, vectors: torch.Tensor, tmp_path: Path) -> None:
    file = exported(tmp_path, model, vectors)
    assert torch.equal(load_file(file)["umt5xxl"], vectors)
    with safe_open(file, framework="pt") as handle:
        assert list(handle.keys()) == ["umt5xxl"]
        assert handle.metadata()["modelspec.trigger_phrase"] == TOKEN
    with pytest.raises(CheckpointError, match="exists; give a new file"):
        app_export(tmp_path)


def test_others_files_are_read_and_unfit_ones_refused(model: Path, tmp_path: Path) -> None:
    def word(**tensors: torch.Tensor) -> Any:
        save_file(tensors, tmp_path / "cat.safetensors")
        return read_word(tmp_path / "cat.safetensors")

    assert word(emb_params=torch.ones(2, 64)).token == "cat"
    assert (word(dog=torch.ones(64)).token, word(dog=torch.ones(64)).vectors.shape) == ("dog", (1, 64))
    with pytest.raises(ModelError, match="holds 2 tensors and none is called umt5xxl"):
        word(clip_l=torch.ones(2, 64), clip_g=torch.ones(2, 64))
    with pytest.raises(ModelError, match="finite"):
        word(umt5xxl=torch.full((2, 64), torch.nan))
    with pytest.raises(ModelError, match="vectors of width 32, the text encoder has 64"):
        add_word(load(model), word(umt5xxl=torch.ones(2, 32)))
    with pytest.raises(ModelError, match="can run code"):
        read_word(model / "model_index.json")
    with pytest.raises(ModelError, match="there is no such file"):
        read_word(tmp_path / "word.safetensors")
