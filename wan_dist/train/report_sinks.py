"""Where reports go: metrics.jsonl, TensorBoard, wandb. Rank 0 only; none of them may end a run."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wan_dist.core.errors import ConfigError
from wan_dist.io.run_folder import METRICS_NAME

logger = logging.getLogger(__name__)


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
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Leave images to the files of their own."""

    def close(self) -> None:
        """Nothing is buffered."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        """Open a file in which everything from `first_step` on is new."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir), purge_step=first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a point for every number."""
        for tag, value in flat(row).items():
            self._writer.add_scalar(tag, value, row["step"])

    def image(self, tag: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Add an image."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush."""
        self._writer.close()


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


def write_all(sinks: list[Sink], row: Mapping[str, Any]) -> None:
    """Give a report to every sink; one that fails is named in the log."""
    for sink in sinks:
        try:
            # On a full disk even TensorBoard raises in the caller (tensorboard 2.21).
            sink.write(row)
        except Exception as error:  # metrics must never end a run, whatever a client library raises
            logger.warning("metrics of step %d could not be written (%s): %s", row["step"], type(sink).__name__, error)
