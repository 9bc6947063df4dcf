"""The run folder: where each file of a run lies, and the small ones that describe it."""

import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import IO, Any

from wan_dist.core.errors import CheckpointError
from wan_dist.io.hashing import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
METRICS_NAME = "metrics.jsonl"
_LOCK_NAME = ".lock"
_UNDER_WAY = ("starting", "training", "saving")
_PACKAGES = ("wan_dist", "torch", "deepspeed", "diffusers", "transformers", "safetensors", "webdataset", "av")


def checkpoints_dir(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / CHECKPOINTS_NAME


def claim_run(run_dir: Path) -> IO[str]:
    """Return the open lock file of a run folder, made if absent; the claim ends with the process that holds it.

    Raises:
        CheckpointError: another process trains in this folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = (run_dir / _LOCK_NAME).open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise CheckpointError(
            f"{run_dir}: process {holder} is training there; wait for it, stop it, or choose another run_dir."
        ) from None
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def describe_run(run_dir: Path, *, config_yaml: str, ds_config: dict[str, Any], world_size: int) -> None:
    """Write what the run is made of: resolved config, DeepSpeed config, environment."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text_atomic(run_dir / CONFIG_NAME, config_yaml)
    write_json_atomic(run_dir / "ds_config.json", ds_config)
    write_json_atomic(run_dir / "environment.json", environment(world_size))


def environment(world_size: int) -> dict[str, Any]:
    """Return versions and hardware, without anything secret."""
    import torch

    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "devices": devices or ["cpu"],
        "num_cpus": os.cpu_count(),
        "world_size": world_size,
    }


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop the rows of `step` and later, and torn ones, from a metrics file; one that is absent stays so."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # a killed run may leave half a row
    write_text_atomic(path, "".join(kept))


def write_status(run_dir: Path, state: str, **values: Any) -> None:
    """Replace `status.json`: what the run is doing now.

    Args:
        run_dir: the run folder.
        state: starting, training, saving, finished, stopped or failed.
        values: further JSON values.
    """
    write_json_atomic(run_dir / "status.json", {"state": state, "time": time.time(), "pid": os.getpid(), **values})


def say_status(run_dir: Path, state: str, **values: Any) -> None:
    """Write the status as `write_status` does; where that cannot be, say so in the log and go on.

    For the end of a run, whose own outcome is what the user must see.
    """
    try:
        write_status(run_dir, state, **values)
    except OSError as error:
        logger.warning("%s could not be written (%s); the run is %s", run_dir / "status.json", error.strerror, state)


def mark_failed(run_dir: Path, error: str, exit_code: int, *, known_better_since: float | None = None) -> None:
    """Make `status.json` say that the run failed, if it still says that this process or one that is gone runs it.

    Args:
        run_dir: the run folder.
        error: why.
        exit_code: of the job.
        known_better_since: `time.time()` of the start of the job, where `error` is the cause of what a rank may have
            written since: that is replaced too.
    """
    try:
        status = read_status(run_dir)
    except CheckpointError:
        return
    replaced = status.get("state") in _UNDER_WAY
    if known_better_since is not None and status.get("state") == "failed":
        replaced = status.get("time", 0.0) >= known_better_since
    if replaced and not _runs_elsewhere(status.get("pid", 0)):
        kept = {name: value for name, value in status.items() if name not in ("state", "time", "pid")}
        say_status(run_dir, "failed", **{**kept, "error": error, "exit_code": exit_code})


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_status(run_dir: Path) -> dict[str, Any]:
    """Return `status.json`.

    Raises:
        CheckpointError: the folder has no readable status.
    """
    path = run_dir / "status.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); is {run_dir} a run folder?") from None
