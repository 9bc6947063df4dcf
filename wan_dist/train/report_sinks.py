"""Where reports go: metrics.jsonl, TensorBoard, wandb. Rank 0 only; none of them may end a run."""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.errors import ConfigError
from wan_dist.io.run_folder import METRICS_NAME

logger = logging.getLogger(__name__)

_PROBE_BYTES = 64 << 10


class Sink(Protocol):
    """Takes reports."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Keep one report; `row["step"]` is its step."""
        ...

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Keep an image, [H, W, 3] RGB in 0..255."""
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


class MetricsFile:
    """One JSON object per line in the run folder."""

    def __init__(self, run_dir: Path) -> None:
        """Remember the file."""
        self._path = run_dir / METRICS_NAME

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a line."""
        line = (json.dumps(row) + "\n").encode()
        with self._path.open("ab", buffering=0) as handle:
            end = handle.seek(0, os.SEEK_END)
            try:
                whole = handle.write(line) == len(line)
            except OSError:
                handle.truncate(end)
                raise
            if not whole:  # the next row would be glued to half of this one
                handle.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Leave images to the files of their own."""

    def close(self) -> None:
        """Nothing is buffered."""


class TensorBoard:
    """Event files in the run folder.

    The thread that writes them dies of the first error and raises it at every later call (tensorboard 2.21), so after
    one the next report begins a new file.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Remember where; what an earlier process wrote of `first_step` and later is purged."""
        self._run_dir = run_dir
        self._purge_step: int | None = first_step
        self._writer: Any = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a point for every number."""
        self._with_writer(
            lambda writer: [writer.add_scalar(tag, value, row["step"]) for tag, value in flat(row).items()]
        )

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Add an image."""
        self._with_writer(lambda writer: writer.add_image(tag, pixels, step, dataformats="HWC"))

    def close(self) -> None:
        """Flush."""
        writer, self._writer = self._writer, None
        if writer:
            writer.close()

    def _with_writer(self, use: Callable[[Any], object]) -> None:
        try:
            self._writer = self._writer or self._open()
            use(self._writer)
        except Exception:
            self._writer = None
            raise

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # On a full disk each try would leave an empty event file.
        probe = self._run_dir / ".events.tmp"
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)
        writer = SummaryWriter(str(self._run_dir), purge_step=self._purge_step)
        self._purge_step = None
        return writer


class Wandb:
    """A wandb run that a resumed job continues; the environment says whether it is online (WANDB_MODE)."""

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        """Start or continue the run of this run folder."""
        wandb = load_wandb()
        identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, name=run_dir.name, id=identity, resume="allow", dir=str(run_dir), config=dict(config)
        )

    def write(self, row: Mapping[str, Any]) -> None:
        """Log every number at its step."""
        self._run.log(flat(row), step=row["step"])

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Log an image at its step."""
        self._run.log({tag: load_wandb().Image(pixels)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def load_wandb() -> Any:
    """Return the wandb module.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "log.wandb_project: wandb is not installed; pip install 'wan_dist[wandb]', or remove the key."
        ) from error
    return wandb


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """Return TensorBoard's tags of a report: `train/loss`, and `loss_by_sigma/0.9-1.0` for the parts of a value."""
    tags: dict[str, float] = {}
    for name, value in row.items():
        if name in ("step", "epoch") or value is None:
            continue
        if isinstance(value, Mapping):
            tags |= {f"{name}/{part}": number for part, number in value.items() if number is not None}
        else:
            tags[f"train/{name}"] = value
    return tags


class Lenient:
    """A sink whose failures cost reports and nothing else: the first is a warning in the log, later ones are quiet."""

    def __init__(self, sink: Sink) -> None:
        """Stand in for `sink`."""
        self._sink = sink
        self._warned = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Give the report on."""
        self._try(lambda: self._sink.write(row), f"the report of step {row['step']}")

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Give the image on."""
        self._try(lambda: self._sink.image(tag, step, pixels), f"{tag} of step {step}")

    def close(self) -> None:
        """Close."""
        self._try(self._sink.close, "what was not written yet")

    def _try(self, give: Callable[[], None], what: str) -> None:
        try:
            give()
        except Exception as error:  # metrics must never end a run, whatever a client library raises
            if not self._warned:
                logger.warning(
                    "%s is lost to %s: %s. Training goes on; this is not said again.",
                    *(what, type(self._sink).__name__, error),
                )
            self._warned = True
