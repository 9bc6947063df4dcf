"""Sharded checkpoints into the folders and files that users load."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wan_dist.core.errors import CheckpointError, ModelError
from wan_dist.io.checkpoint import Checkpoint
from wan_dist.io.component_weights import (
    base_transformer,
    chosen_components,
    expert_of,
    full_weights,
    lora_weights,
    merged_weights,
    method_of,
)
from wan_dist.io.hashing import write_json_atomic, write_text_atomic
from wan_dist.io.model_files import WEIGHTS_NAME, in_naming
from wan_dist.io.provenance import header_of, model_card
from wan_dist.io.safetensors_stream import num_bytes, write_file, write_sharded
from wan_dist.io.tensor_stream import TensorStream
from wan_dist.models.wan.original import original_config

_DTYPE_LABELS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Progress:
    """How a long export reports: `start(total_bytes)` once, then `advance(num_bytes)`."""

    start: Callable[[int], None]
    advance: Callable[[int], None]


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        checkpoint: a verified checkpoint.
        weights: component to its tensors by diffusers' names.
        title: name of the result.
        dtype: dtype of the tensors.
        max_shard_bytes: size at which a new weight file begins, where the layout has several.
        ema: whether the weights are the running average.
        on_bytes: told of bytes written and compared.
    """

    checkpoint: Checkpoint
    weights: Mapping[str, Mapping[str, TensorStream]]
    title: str
    dtype: torch.dtype
    max_shard_bytes: int
    ema: bool
    on_bytes: Callable[[int], None]

    @property
    def base(self) -> Path:
        """The pipeline folder that the run started from."""
        return Path(self.checkpoint.state["model_path"])

    def header(self, component: str) -> dict[str, str]:
        """Return the header strings of a component's files."""
        return header_of(self.checkpoint, component, self.title, ema=self.ema)

    def write(self, folder: Path, component: str, tensors: Mapping[str, TensorStream]) -> None:
        """Write tensors as diffusers names weight files."""
        write_sharded(
            folder,
            WEIGHTS_NAME,
            tensors,
            dtype=self.dtype,
            max_shard_bytes=self.max_shard_bytes,
            metadata=self.header(component),
            on_bytes=self.on_bytes,
        )


def consolidate(
    checkpoint: Checkpoint,
    out: Path,
    *,
    layout: str,
    dtype: torch.dtype,
    max_shard_bytes: int,
    progress: Progress,
    expert: str | None = None,
    ema: bool = False,
    merge_lora: bool = False,
    dry_run: bool = False,
) -> Path:
    """Write the trained transformers of a checkpoint in a layout that others load.

    Args:
        checkpoint: a verified checkpoint.
        out: folder to make; it appears only when complete.
        layout: a key of `LAYOUTS`.
        dtype: dtype of the written tensors.
        max_shard_bytes: size at which a new weight file begins; ComfyUI's files are always whole.
        progress: told of bytes written and compared.
        expert: only this one; None for all that were trained.
        ema: the running average instead of the last weights.
        merge_lora: add the LoRA of the checkpoint to the weights it was trained on.
        dry_run: check all that can be checked without writing, tell `progress` the size, and stop.

    Returns:
        `out`.

    Raises:
        CheckpointError: `out` exists, the checkpoint's layout is unknown, or it holds no whole transformer.
        ModelError: the base pipeline folder that the run names is gone.
    """
    components = _transformers(checkpoint, expert, merge_lora)
    base = Path(checkpoint.state["model_path"])
    for component in components:
        if not (base / component / "config.json").is_file():
            raise ModelError(f"{base}: the base pipeline of this run is gone; put it back, its other parts are needed.")
    weights = {component: _weights(checkpoint, component, ema) for component in components}
    size = sum(num_bytes(tensors, dtype) for tensors in weights.values())
    progress.start(2 * size)  # every byte is written once and read back once
    export = Export(checkpoint, weights, out.resolve().name, dtype, max_shard_bytes, ema, progress.advance)
    size += copied_bytes(base, weights) if layout == "diffusers" else 0
    if dry_run:
        check_folder(out, size)
        return out
    with new_folder(out, size) as folder:
        usage = LAYOUTS[layout](export, folder)
        label = _DTYPE_LABELS[dtype]
        card = model_card(
            checkpoint, export.title, components=components, layout=layout, dtype=label, ema=ema, usage=usage
        )
        write_text_atomic(folder / "README.md", card)
    return out


def check_folder(out: Path, size: int) -> None:
    """Return if a folder of `size` bytes can be made.

    Raises:
        CheckpointError: `out` exists and is not an empty folder, or the disk has no room for it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not empty; give a new folder.")
    place = next(folder for folder in out.resolve().parents if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < size:
        raise CheckpointError(f"{out}: needs {size / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free.")


@contextmanager
def new_folder(out: Path, size: int) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Args:
        out: folder to make.
        size: bytes that it will hold.

    Raises:
        CheckpointError: `out` exists and is not an empty folder, or the disk has no room for it.
    """
    check_folder(out, size)
    out = out.resolve()  # "." has no name to derive another from
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copied_bytes(base: Path, replaced: Mapping[str, Any]) -> int:
    """Return how much `copy_pipeline` copies, bytes."""
    files = (path for path in base.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if not _is_replaced(base, path.parent, path.name, replaced))


def copy_pipeline(base: Path, folder: Path, replaced: Mapping[str, Any]) -> None:
    """Copy a pipeline folder without the weights of the components in `replaced`; raises as `copy_tree`."""
    copy_tree(base, folder, lambda directory, name: _is_replaced(base, directory, name, replaced))


def copy_tree(
    source: Path, folder: Path, is_left_out: Callable[[Path, str], bool] = lambda _directory, _name: False
) -> None:
    """Copy a folder without what `is_left_out(directory, name)` says.

    Raises:
        CheckpointError: a file cannot be read or written.
    """

    def ignore(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if is_left_out(Path(directory), name)]

    try:
        shutil.copytree(source, folder, ignore=ignore, dirs_exist_ok=True)
    except shutil.Error as error:  # all files' errors, after the last one
        path, _, why = error.args[0][0]
        raise CheckpointError(f"{path}: cannot be copied ({why}).") from None


def _is_replaced(base: Path, directory: Path, name: str, replaced: Mapping[str, Any]) -> bool:
    return directory.parent == base and directory.name in replaced and name.startswith(WEIGHTS_NAME)


def expert_file(title: str, expert: str | None) -> str:
    """Return the file name of one expert's single file."""
    return f"{title}_{expert}.safetensors" if expert else f"{title}.safetensors"


def _transformers(checkpoint: Checkpoint, expert: str | None, merge_lora: bool) -> tuple[str, ...]:
    kind = method_of(checkpoint)["kind"]
    if kind == "embedding":
        raise CheckpointError(f"{checkpoint.folder}: holds a text embedding; use wan-dist embedding export.")
    if kind == "lora" and not merge_lora:
        raise CheckpointError(
            f"{checkpoint.folder}: holds a LoRA; use wan-dist lora export, or --merge-lora for a whole model with it."
        )
    if kind == "full" and merge_lora:
        raise CheckpointError(f"{checkpoint.folder}: holds whole weights and no LoRA; leave --merge-lora out.")
    return chosen_components(checkpoint, expert)


def _weights(checkpoint: Checkpoint, component: str, ema: bool) -> dict[str, TensorStream]:
    if method_of(checkpoint)["kind"] == "full":
        return full_weights(checkpoint, component, ema=ema)
    lora = lora_weights(checkpoint, component, ema=ema)
    base = Path(checkpoint.state["model_path"]) / component
    return merged_weights(base_transformer(checkpoint, component), [(lora, 1.0)], str(base))


def _to_diffusers(export: Export, folder: Path) -> str:
    """Write the base pipeline with the trained transformers in place of its own."""
    copy_pipeline(export.base, folder, export.weights)
    for component, tensors in export.weights.items():
        export.write(folder / component, component, tensors)
    pipeline = json.loads((export.base / "model_index.json").read_text())["_class_name"]
    return f'import diffusers\n\npipeline = diffusers.{pipeline}.from_pretrained("{export.title}")'


def _to_original(export: Export, folder: Path) -> str:
    """Write the official repository's layout: a folder per expert, or the only transformer at the top."""
    for component, tensors in export.weights.items():
        expert = expert_of(export.checkpoint, component)
        target = folder / f"{expert}_model" if expert else folder
        target.mkdir(exist_ok=True)
        export.write(target, component, in_naming(tensors, "original"))
        config = json.loads((export.base / component / "config.json").read_text())
        write_json_atomic(target / "config.json", original_config(config, export.checkpoint.state["variant"]))
    return ""


def _to_comfyui(export: Export, folder: Path) -> str:
    """Write one file per expert for ComfyUI's `models/diffusion_models`, under bare original names as it ships them."""
    for component, tensors in export.weights.items():
        write_file(
            folder / expert_file(export.title, expert_of(export.checkpoint, component)),
            in_naming(tensors, "original"),
            dtype=export.dtype,
            metadata=export.header(component),
            on_bytes=export.on_bytes,
        )
    return ""


LAYOUTS: dict[str, Callable[[Export, Path], str]] = {
    "diffusers": _to_diffusers,
    "original": _to_original,
    "comfyui": _to_comfyui,
}
"""Writer of each layout: fills a folder, returns Python lines that load it (none where no Python does)."""
