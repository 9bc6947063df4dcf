"""Saving while training goes on: snapshot, write in another process, agree, commit.

A save has three moments. `start` copies this rank's state to host memory, which is all that training waits for.
A writer process then writes, syncs and reads back. `poll`, at later step boundaries, finds out whether every rank is
done, and rank 0 commits. Whatever goes wrong costs the save under way: the previous checkpoint stays, training goes
on, and the next save tries again.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from wan_dist.io import checkpoint as checkpoints
from wan_dist.io import random_state
from wan_dist.io.capture import capture
from wan_dist.io.checkpoint import TEMPORARY_PREFIX, folder_name
from wan_dist.io.file_image import FileImage, UnknownLayoutError, safetensors_image, torch_image
from wan_dist.io.synced_file import write_image, write_synced
from wan_dist.io.writer import Arena, WriterProcess

logger = logging.getLogger(__name__)

_WAIT_S = 0.05
# Sizes vary a little, and metrics, logs and other jobs share the disk.
_DISK_MARGIN = 1.2


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank.

    Attributes:
        step: the step saved.
        folder: the committed checkpoint, or None.
        problem: why there is none, or None.
        stall_s: seconds that training waited for this rank's snapshot.
        total_s: seconds from the start to the commit.
    """

    step: int
    folder: Path | None
    problem: str | None
    stall_s: float
    total_s: float


@dataclass
class _Pending:
    step: int
    folder: Path
    manifest: dict[str, Any]
    started: float
    stall_s: float = 0.0
    waiting: set[str] = field(default_factory=set)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure: str | None = None


class Saver:
    """Saves of one run, one at a time. Every method is called by all ranks at the same place."""

    def __init__(
        self, root: Path, device: torch.device, *, asynchronous: bool, keep_last: int, keep_every: int = 0
    ) -> None:
        """Remember where to save.

        Args:
            root: the run's `checkpoints` folder, on a file system that all ranks share.
            device: where this rank computes; its collectives need tensors there.
            asynchronous: write in another process; else `start` writes and returns when it is done.
            keep_last: newest checkpoints kept.
            keep_every: steps whose multiples are kept for good; 0 for none.
        """
        self._root, self._device, self._asynchronous = root, device, asynchronous
        self._keep_last, self._keep_every = keep_last, keep_every
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())
        self._arena = Arena(pin=device.type == "cuda", local_ranks=local_ranks)
        self._writer: WriterProcess | None = None
        self._pending: _Pending | None = None
        self._told_memory = False
        self._last_bytes = 0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    def start(
        self,
        engines: Mapping[str, Any],
        step: int,
        state: Mapping[str, Any],
        *,
        zero_stage: int,
        exclude_frozen: bool,
        ema: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        """Take a snapshot of all state and begin to write it; collective, no save may be under way.

        Args:
            engines: the DeepSpeed engine of each component, on an accumulation boundary.
            step: optimizer steps done.
            state: JSON values to get back at resume, the same on every rank.
            zero_stage: ZeRO stage of the engines.
            exclude_frozen: leave out weights that are not trained; a resume takes them from the base model.
            ema: this rank's averaged flat tensors by component, one per group of its optimizer.
        """
        assert self._pending is None
        started = time.perf_counter()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        folder = self._root / f"{TEMPORARY_PREFIX}{step:08d}"
        manifest = {
            "version": checkpoints.MANIFEST_VERSION,
            "step": step,
            "world_size": world_size,
            "zero_stage": zero_stage,
            "components": list(engines),
            "state": json.loads(json.dumps(state)),  # training goes on and changes what it counts
        }
        pending = self._pending = _Pending(step, folder, manifest, started)
        pending.failure = _from_rank_0(lambda: self._prepare(folder, engines))
        if pending.failure:
            return
        capture(
            engines,
            folder,
            exclude_frozen=exclude_frozen,
            keep=lambda value, path: self._keep(path, lambda: torch_image(value), lambda out: torch.save(value, out)),
        )
        for component, flats in (ema or {}).items():
            tensors = {f"group_{number:04d}": flat for number, flat in enumerate(flats)}
            self._keep_tensors(folder / component / checkpoints.average_name(rank), tensors)
        self._keep_tensors(folder / random_state.file_name(rank), random_state.snapshot())
        pending.stall_s = time.perf_counter() - started

    def poll(self) -> Outcome | None:
        """Return how the save under way ended, None if it goes on or there is none; never waits for a disk."""
        if self._pending is None:
            return None
        self._listen(0.0)
        done = torch.tensor([not self._pending.waiting], dtype=torch.int32, device=self._device)
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return self._finish() if int(done.item()) else None

    def wait(self) -> Outcome | None:
        """Return how the save under way ended once it has; None if there is none."""
        if self._pending is None:
            return None
        while self._pending.waiting:
            self._listen(_WAIT_S)
        return self._finish()

    def progress(self) -> tuple[int, int] | None:
        """Return what changes while the save under way makes progress, None if there is none; any thread may ask."""
        if self._pending is None:
            return None
        return self._writer.progress_bytes if self._writer else 0, checkpoints.bytes_under_way(self._root)

    def close(self) -> None:
        """End the writer process and give its memory back; what was not committed is lost."""
        if self._writer:
            self._writer.close()
            self._writer = None
        self._arena.close()

    def _prepare(self, folder: Path, engines: Mapping[str, Any]) -> str | None:
        """Make the folders of a save; return why not, if so."""
        try:
            for leftover in self._root.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for component in engines:
                (folder / component).mkdir(parents=True)
            needed, free = int(self._last_size() * _DISK_MARGIN), shutil.disk_usage(self._root).free
        except OSError as error:
            return str(error)
        if needed > free:
            return (
                f"{needed / 1e9:.2f} GB are needed (1.2 times the last checkpoint), {free / 1e9:.2f} GB are free; "
                "free some, or lower checkpoint.keep_last"
            )
        return None

    def _last_size(self) -> int:
        if not self._last_bytes:
            for folder in checkpoints.step_folders(self._root)[:1]:
                try:
                    self._last_bytes = checkpoints.read_manifest(folder).num_bytes
                except checkpoints.CheckpointError:
                    return 0
        return self._last_bytes

    def _keep_tensors(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        image = safetensors_image({name: tensor.detach() for name, tensor in tensors.items()})
        self._keep(path, lambda: image, lambda out: write_image(image, out))

    def _keep(self, path: Path, image_of: Callable[[], FileImage], write: Callable[[IO[bytes]], None]) -> None:
        """Have a file written, by the writer process if its image fits into memory, else here and now."""
        assert self._pending is not None
        if self._pending.failure:
            return  # the rest of a save that failed already
        name = path.relative_to(self._pending.folder).as_posix()
        try:
            if self._asynchronous and self._hand_over(path, name, image_of):
                return
            self._pending.files[name] = write_synced(path, write)
        except Exception as error:  # every rank must reach the agreement on this save, whatever went wrong here
            self._fail(f"{name}: {error}")

    def _hand_over(self, path: Path, name: str, image_of: Callable[[], FileImage]) -> bool:
        try:
            image = image_of()
        except UnknownLayoutError as error:
            logger.warning("%s is written while training waits: %s", name, error)
            return False
        slot = self._arena.take(name, image.size)
        if slot is None:
            if not self._told_memory:
                self._told_memory = True
                logger.warning(
                    "host memory does not hold a snapshot of %s (%.1f GB per rank); checkpoints are written while "
                    "training waits. checkpoint.async: false says so on purpose.",
                    *(name, image.size / 1e9),
                )
            return False
        image.copy_to(slot.tensor.narrow(0, 0, image.size))
        if self._writer and not self._writer.alive:
            self._lose_writer()
        self._writer = self._writer or WriterProcess()
        assert self._pending is not None
        try:
            self._writer.write(path, slot, image.size)
            self._pending.waiting.add(str(path))
        except OSError as error:
            self._fail(f"the writer process ended ({error})")
            self._lose_writer()
        return True

    def _listen(self, wait_s: float) -> None:
        """Take the writer's answers."""
        pending = self._pending
        assert pending is not None
        if self._writer is None or not pending.waiting:
            return
        try:
            answers = self._writer.answers(wait_s=wait_s)
        except OSError as error:
            self._fail(f"the writer process ended ({error})")
            self._lose_writer()
            return
        for answer in answers:
            if answer["file"] not in pending.waiting:
                continue  # a folder that it deleted
            pending.waiting.discard(answer["file"])
            name = Path(answer["file"]).relative_to(pending.folder).as_posix()
            if error := answer.get("error"):
                self._fail(f"{name}: {error}")
            else:
                pending.files[name] = {"bytes": answer["bytes"], "sha256": answer["sha256"]}

    def _lose_writer(self) -> None:
        """Forget a writer process that ended, and what it was asked for; the next file gets a new one."""
        assert self._pending is not None
        if self._pending.waiting:
            self._fail("the writer process ended")
        if self._writer:
            self._writer.close()
            self._writer = None
        self._pending.waiting.clear()

    def _fail(self, why: str) -> None:
        assert self._pending is not None
        self._pending.failure = self._pending.failure or f"rank {dist.get_rank()}: {why}"

    def _finish(self) -> Outcome:
        """Agree on the save under way, whose files are all written or failed, and commit it; collective."""
        pending = self._pending
        assert pending is not None
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, (pending.failure, pending.files))
        failures = sorted({failure for failure, _ in reports if failure})
        problem = "; ".join(failures) or None
        pending.manifest["files"] = {name: entry for _, files in reports for name, entry in files.items()}
        committed = pending.folder.with_name(folder_name(pending.step))
        if problem is None:
            problem = _from_rank_0(lambda: _commit(pending.folder, pending.manifest))
        if dist.get_rank() == 0:
            self._clean(problem, pending)
        self._pending = None
        took_s = time.perf_counter() - pending.started
        return Outcome(pending.step, None if problem else committed, problem, pending.stall_s, took_s)

    def _clean(self, problem: str | None, pending: _Pending) -> None:
        if problem:
            shutil.rmtree(pending.folder, ignore_errors=True)
            return
        self._last_bytes = sum(entry["bytes"] for entry in pending.manifest["files"].values())
        try:
            checkpoints.prune(self._root, self._keep_last, self._keep_every, self._delete)
        except OSError as error:
            logger.warning("old checkpoints could not be deleted: %s", error)

    def _delete(self, folder: Path) -> None:
        if self._writer is None:
            shutil.rmtree(folder)
        else:
            self._writer.delete(folder)


def _commit(folder: Path, manifest: dict[str, Any]) -> str | None:
    try:
        checkpoints.commit(folder, manifest)
    except OSError as error:
        return str(error)
    return None


def _from_rank_0(action: Callable[[], str | None]) -> str | None:
    """Return on every rank what `action` returned on rank 0; collective."""
    values = [action() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]
