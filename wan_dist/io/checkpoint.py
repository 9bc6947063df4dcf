"""Checkpoints of a run: whole and verified, or absent.

DeepSpeed names a checkpoint in `latest` before all ranks have written it and detects no damage (measured with
0.19.8). So every rank writes into a temporary folder (`wan_dist.io.saving`), everything is synced, hashed and read
back, all ranks agree, the manifest is written, and only then is the folder renamed and the pointer replaced. The
pointer is a hint: the newest folder whose manifest verifies is the truth.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_dist.core.errors import CheckpointError
from wan_dist.core.hashing import sha256_of
from wan_dist.io import trust
from wan_dist.io.hashing import sync, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
POINTER_NAME = "latest"
MANIFEST_VERSION = 2
SAVED = "saved"
TEMPORARY_PREFIX = ".tmp-step-"
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
        manifest: all of it, as read.
    """

    folder: Path
    step: int
    world_size: int
    zero_stage: int
    components: tuple[str, ...]
    state: dict[str, Any]
    files: dict[str, dict[str, Any]]
    manifest: dict[str, Any] = field(repr=False)

    @property
    def saved(self) -> float:
        """When it was committed, seconds since 1970; of manifests that do not say so, when its folder changed."""
        return self.manifest.get(SAVED) or self.folder.stat().st_mtime

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry["bytes"] for entry in self.files.values())

    def missing(self) -> list[str]:
        """Return which files are absent or of another size, one line each; no file is read."""
        found = []
        for name, entry in sorted(self.files.items()):
            path = self.folder / name
            if not path.is_file():
                found.append(f"{path}: missing")
            elif path.stat().st_size != entry["bytes"]:
                found.append(f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written")
        return found

    def problems(self) -> list[str]:
        """Return what is wrong with the files, one line each; empty if every byte is as written."""
        found = self.missing()
        named = {line.partition(": ")[0] for line in found}
        for name, entry in sorted(self.files.items()):
            path = self.folder / name
            if str(path) not in named and sha256_of(path) != entry["sha256"]:
                found.append(f"{path}: content changed since it was written (SHA-256)")
        return found

    def require_own(self, *, trusted: bool, option: str) -> None:
        """Return if its shards may be loaded; see `wan_dist.io.trust.require_own`."""
        trust.require_own(self.folder, self.manifest, trusted=trusted, option=option)


def folder_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def average_name(rank: int) -> str:
    """Return the file of a rank's running average in a component's folder."""
    return f"ema-{rank:05d}.safetensors"


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint folder's name says.

    Raises:
        ValueError: it is no checkpoint folder's name.
    """
    if not (match := _STEP_FOLDER.fullmatch(folder.name)):
        raise ValueError(folder.name)
    return int(match.group(1))


def read_manifest(folder: Path) -> Checkpoint:
    """Return the checkpoint that a folder's manifest describes, its files not yet verified.

    Raises:
        CheckpointError: no manifest, or not one of ours.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text())
        if "step" not in manifest:  # shards have a manifest too
            raise CheckpointError(f"{path}: not a checkpoint's; give a run folder or one of its checkpoints.")
        if manifest["version"] != MANIFEST_VERSION:
            raise CheckpointError(f"{path}: version {manifest['version']}, this program reads {MANIFEST_VERSION}.")
        if not trust.is_intact(manifest):
            raise CheckpointError(f"{path}: damaged, its content changed since it was written (SHA-256).")
        return Checkpoint(
            folder,
            manifest["step"],
            manifest["world_size"],
            manifest["zero_stage"],
            tuple(manifest["components"]),
            manifest["state"],
            _checked(manifest["files"], path),
            manifest,
        )
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no {MANIFEST_NAME}; the checkpoint was never completed.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint's ({error!r}).") from None


def _checked(files: dict[str, dict[str, Any]], manifest: Path) -> dict[str, dict[str, Any]]:
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{manifest}: names {name!r}, which lies outside of its folder.")
        if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise CheckpointError(f"{manifest}: damaged at {name!r}.")
    return files


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


def commit(temporary: Path, manifest: dict[str, Any]) -> Path:
    """Make a temporary folder, its files written and synced by all ranks, the checkpoint of its step; rank 0 only.

    Returns:
        The committed folder.

    Raises:
        OSError: the disk is full or broken; the temporary folder is still one.
    """
    final = temporary.with_name(folder_name(manifest["step"]))
    write_json_atomic(temporary / MANIFEST_NAME, trust.sign({**manifest, SAVED: time.time()}))
    for folder in {(temporary / name).parent for name in manifest["files"]}:
        sync(folder)
    replaced = final.with_name(f"{TEMPORARY_PREFIX}replaced-{time.time_ns()}")
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    try:
        write_text_atomic(final.parent / POINTER_NAME, final.name + "\n")
    except OSError as error:
        logger.warning("%s could not be written (%s); the checkpoint itself is whole", POINTER_NAME, error)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def set_aside_newer(root: Path, step: int) -> None:
    """Rename what lies after `step`: damaged, passed over by resume, and not to be counted as kept; rank 0 only."""
    for folder in step_folders(root):
        if folder.name > folder_name(step):
            aside = folder.with_name(f"damaged-{folder.name}-{time.time_ns()}")
            logger.warning("%s is damaged and was renamed to %s; delete it when you like", folder, aside.name)
            folder.rename(aside)


def superfluous(root: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Return the checkpoint folders that retention gives up, oldest last.

    Only folders whose files are all there in full count as kept, so that a torn one never costs a whole one.

    Args:
        root: the run's checkpoints folder.
        keep_last: newest ones kept.
        keep_every: steps whose multiples are kept for good; 0 for none.
    """
    kept, given_up = 0, []
    for folder in step_folders(root):
        if kept >= keep_last and not (keep_every and step_of(folder) % keep_every == 0):
            given_up.append(folder)
        elif kept < keep_last:
            kept += _is_complete(folder)
    return given_up


def _is_complete(folder: Path) -> bool:
    try:
        return not read_manifest(folder).missing()
    except CheckpointError:
        return False


def prune(root: Path, keep_last: int, keep_every: int = 0, delete: Callable[[Path], None] = shutil.rmtree) -> list[str]:
    """Delete what retention gives up and what interrupted saves left; rank 0 only, with no save under way.

    A folder is renamed before it is deleted: half a checkpoint never looks like one.

    Returns:
        Names of the checkpoints deleted.
    """
    names = []
    for folder in superfluous(root, keep_last, keep_every):
        logger.info("deleting old checkpoint %s", folder.name)
        folder.rename(folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}-{time.time_ns()}"))
        names.append(folder.name)
    for leftover in root.glob(f"{TEMPORARY_PREFIX}*"):
        try:
            delete(leftover)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", leftover, error)
    return names


def bytes_under_way(root: Path) -> int:
    """Return the bytes in unfinished saves of a run, by all ranks: what grows while a save makes progress."""
    total = 0
    for folder in root.glob(f"{TEMPORARY_PREFIX}*"):
        for path in folder.rglob("*"):
            try:
                total += path.stat().st_size
            except OSError:
                continue  # it was renamed or deleted meanwhile
    return total
