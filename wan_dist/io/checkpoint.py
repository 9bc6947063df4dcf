"""Checkpoints of a run: whole and verified, or absent.

DeepSpeed names a checkpoint in `latest` before all ranks have written it and detects no damage (measured with
0.19.8). So every rank writes into a temporary folder, everything is synced and hashed, all ranks agree, the manifest
is written, and only then is the folder renamed and the pointer replaced. The pointer is a hint: the newest folder
whose manifest verifies is the truth.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from wan_dist.core.errors import CheckpointError
from wan_dist.io.hashing import sha256_of, sync, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"
MANIFEST_VERSION = 2
_STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest could be read.

    Attributes:
        folder: `checkpoints/step-00000100`.
        step: optimizer steps done.
        world_size: ranks that wrote it.
        zero_stage: ZeRO stage of its shards.
        components: trained modules, each in a folder of its name.
        state: what the training loop put in: data position, identity of the run.
        files: size and SHA-256 of every file.
    """

    folder: Path
    step: int
    world_size: int
    zero_stage: int
    components: tuple[str, ...]
    state: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def problems(self) -> list[str]:
        """Return what is wrong with the files, one line each; empty if every byte is as written."""
        found = []
        for name, entry in sorted(self.files.items()):
            path = self.folder / name
            if not path.is_file():
                found.append(f"{path}: missing")
            elif path.stat().st_size != entry["bytes"]:
                found.append(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written")
            elif sha256_of(path) != entry["sha256"]:
                found.append(f"{path}: content changed since it was written (SHA-256)")
        return found


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def read_manifest(folder: Path) -> Checkpoint:
    """Return the checkpoint that a folder's manifest describes, its files not yet verified.

    Raises:
        CheckpointError: no manifest, or not one of ours.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != MANIFEST_VERSION:
            raise CheckpointError(f"{path}: version {manifest['version']}, this program reads {MANIFEST_VERSION}.")
        return Checkpoint(
            folder,
            manifest["step"],
            manifest["world_size"],
            manifest["zero_stage"],
            tuple(manifest["components"]),
            manifest["state"],
            manifest["files"],
        )
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; the checkpoint was never completed.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint's ({error!r}).") from None


def step_folders(root: Path) -> list[Path]:
    """Return the committed checkpoint folders of a run, newest first."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if p.is_dir() and _STEP_FOLDER.fullmatch(p.name)), reverse=True)


def newest_whole(root: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose every file verifies; damaged ones are named in the log and passed over."""
    for folder in step_folders(root):
        try:
            checkpoint = read_manifest(folder)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        problems = checkpoint.problems()
        if not problems:
            return checkpoint
        logger.warning("passed over %s: %s", folder.name, "; ".join(problems))
    return None


def save(
    engines: Mapping[str, Any],
    root: Path,
    step: int,
    state: dict[str, Any],
    *,
    zero_stage: int,
    exclude_frozen: bool,
) -> Path:
    """Write and commit the checkpoint of `step`; collective. Call on an accumulation boundary only.

    Args:
        engines: the DeepSpeed engine of each trained component.
        root: the run's `checkpoints` folder, on a file system that all ranks share.
        step: optimizer steps done.
        state: JSON values to get back at resume, the same on every rank.
        zero_stage: ZeRO stage of the engines.
        exclude_frozen: leave out weights that are not trained; a resume loads them from the base model.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: some rank could not write; nothing was committed.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    temporary, final = root / f".tmp-{folder_name(step)}", root / folder_name(step)
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        for component, engine in engines.items():
            engine.save_checkpoint(
                str(temporary), tag=component, save_latest=False, exclude_frozen_parameters=exclude_frozen
            )
    except (OSError, RuntimeError) as error:
        # DeepSpeed's own collectives lie in there, so the ranks cannot agree any more: this rank's end ends the job.
        raise CheckpointError(
            f"{temporary}: rank {rank} could not write ({error}); the previous checkpoint is untouched."
        ) from error
    failure = _attempt(lambda: save_file(_rng_state(), temporary / _rng_name(rank)))
    dist.barrier()
    hashes: dict[str, dict[str, Any]] = {}
    failure = failure or _attempt(lambda: hashes.update(_sync_and_hash(temporary, rank, world_size)))
    reports: list[Any] = [None] * world_size
    dist.all_gather_object(reports, (failure, hashes))
    _raise_failures([r[0] for r in reports], temporary, rank)
    commit_failure = None
    if rank == 0:
        files = {name: entry for _, part in reports for name, entry in part.items()}
        manifest = {
            "version": MANIFEST_VERSION,
            "step": step,
            "world_size": world_size,
            "zero_stage": zero_stage,
            "components": list(engines),
            "state": state,
            "files": files,
        }
        commit_failure = _attempt(lambda: _commit(temporary, final, manifest))
    dist.all_gather_object(reports, commit_failure)
    _raise_failures(reports, temporary, rank)
    return final


def _attempt(action: Any) -> str | None:
    try:
        action()
    except Exception as error:  # every rank must reach the agreement that follows, whatever went wrong here
        return repr(error)
    return None


def _raise_failures(failures: Sequence[str | None], temporary: Path, rank: int) -> None:
    named = [f"rank {r}: {f}" for r, f in enumerate(failures) if f]
    if named:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{temporary}: not saved, {'; '.join(named)}; the previous checkpoint is untouched.")


def _rng_name(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _rng_state() -> dict[str, torch.Tensor]:
    # ZeRO <= 2 and universal checkpoints hand rank 0's client state to every rank, hence a file per rank.
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _sync_and_hash(folder: Path, rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of this rank's share of the folder's files, all synced to the disk."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    entries = {}
    for name in names[rank::world_size]:
        path = folder / name
        sync(path)
        entries[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return entries


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    write_json_atomic(temporary / MANIFEST_NAME, manifest)
    replaced = final.with_name(f".tmp-{final.name}-replaced")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    write_text_atomic(final.parent / POINTER_NAME, final.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)


def check_world_size(checkpoint: Checkpoint, world_size: int) -> None:
    """Return if this number of ranks can continue from the checkpoint.

    Raises:
        CheckpointError: another number wrote it.
    """
    if checkpoint.world_size != world_size:
        raise CheckpointError(
            f"{checkpoint.folder}: written by {checkpoint.world_size} ranks, this job has {world_size}; "
            f"start it with {checkpoint.world_size}."
        )


def restore(engines: Mapping[str, Any], checkpoint: Checkpoint, *, exclude_frozen: bool) -> None:
    """Load weights, optimizer state and this rank's random state; collective.

    Args:
        engines: the DeepSpeed engine of each component, fresh.
        checkpoint: what to continue from.
        exclude_frozen: whether it was saved without frozen weights, which then keep what the engines hold.

    Raises:
        CheckpointError: written by another number of ranks, or DeepSpeed could not load it.
    """
    check_world_size(checkpoint, dist.get_world_size())
    for component, engine in engines.items():
        # Always an explicit tag and always the optimizer: DeepSpeed's partial modes load nothing under ZeRO-3 (0.19.8).
        path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=component, load_module_strict=not exclude_frozen)
        if path is None:
            raise CheckpointError(f"{checkpoint.folder / component}: DeepSpeed loaded nothing from it.")
    states = load_file(checkpoint.folder / _rng_name(dist.get_rank()))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def set_aside_newer(root: Path, step: int) -> None:
    """Rename what lies after `step`: damaged, passed over by resume, and not to be counted as kept; rank 0 only."""
    for folder in step_folders(root):
        if folder.name > folder_name(step):
            aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns()}")
            logger.warning("%s is damaged and was renamed to %s; delete it when you like", folder, aside.name)
            folder.rename(aside)


def prune(root: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints and what interrupted saves left; rank 0 only, after a save."""
    for folder in step_folders(root)[keep_last:]:
        logger.info("deleting old checkpoint %s", folder.name)
        shutil.rmtree(folder)
    for leftover in root.glob(".tmp-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
