"""Trained words out of checkpoints."""

from pathlib import Path

import torch

from wan_dist.adapters.embedding import PARAMETER_NAME
from wan_dist.adapters.embedding_files import EMBEDDING_KEY, TOKEN_KEY
from wan_dist.core.errors import CheckpointError
from wan_dist.io.checkpoint import Checkpoint
from wan_dist.io.component_weights import method_of, trained_tensors
from wan_dist.io.lora_export import check_free
from wan_dist.io.provenance import header_of
from wan_dist.io.safetensors_stream import write_file
from wan_dist.io.tensor_stream import of_shards

COMPONENT = "embedding"


def export_word(checkpoint: Checkpoint, out: Path, *, dtype: torch.dtype, ema: bool = False) -> Path:
    """Write the word that a run trained as the file that ComfyUI and `wan-dist generate` load.

    Args:
        checkpoint: a verified checkpoint of embedding training.
        out: `NAME.safetensors`.
        dtype: of the vectors.
        ema: the running average instead of the last vectors.

    Raises:
        CheckpointError: no embedding in it, or `out` exists.
    """
    method = method_of(checkpoint)
    if method["kind"] != "embedding":
        verb = "lora export" if method["kind"] == "lora" else "consolidate"
        raise CheckpointError(f"{checkpoint.folder}: holds {method['kind']} training; use wan-dist {verb}.")
    check_free(out)
    header = header_of(checkpoint, COMPONENT, out.stem, ema=ema, kind="textual-inversion")
    header |= {"modelspec.trigger_phrase": method["token"], TOKEN_KEY: method["token"]}
    vectors = trained_tensors(checkpoint, COMPONENT, ema=ema)[PARAMETER_NAME]
    out.parent.mkdir(parents=True, exist_ok=True)
    streams = {EMBEDDING_KEY: of_shards(vectors)}
    write_file(out, streams, dtype=dtype, metadata=header, on_bytes=lambda _: None)
    return out
