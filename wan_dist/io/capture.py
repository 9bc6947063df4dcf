"""What DeepSpeed would save, caught before it is written.

DeepSpeed's own `save_checkpoint` decides the content; only the writing is ours. So what lies on the disk is what its
`load_checkpoint` and `zero_to_fp32` read, and no failing write can leave one rank waiting in its collectives.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Keep = Callable[[Any, Path], None]


class CapturingEngine:
    """Stands in for DeepSpeed's checkpoint engine while a save is taken; everything else is the real one's."""

    def __init__(self, real: Any, keep: Keep) -> None:
        """Hand what is saved to `keep`, which raises nothing."""
        self._real, self._keep = real, keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create(self, info: Any) -> None:
        """Do nothing: there is no folder to prepare."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: the saver makes the folders."""

    def save(self, state_dict: Any, path: str) -> None:
        """Take one file's content."""
        self._keep(state_dict, Path(path))

    def commit(self, info: Any) -> bool:
        """Do nothing: the saver commits."""
        return True

    def is_decoupled(self) -> bool:
        """Say that nothing is written later as far as DeepSpeed is concerned."""
        return False


@contextmanager
def _capturing(engine: Any, keep: Keep) -> Iterator[None]:
    real = engine.checkpoint_engine
    engine.checkpoint_engine = CapturingEngine(real, keep)
    # DeepSpeed copies its recovery scripts beside every save, and a full disk would raise on rank 0 alone, between
    # two barriers. `wan-dist consolidate` and the installed `zero_to_fp32` do what they do.
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        engine.checkpoint_engine = real
        del engine._copy_recovery_script


def capture(engines: Mapping[str, Any], folder: Path, *, exclude_frozen: bool, keep: Keep) -> None:
    """Give `keep` every file that this rank would write of every component; collective.

    Args:
        engines: the DeepSpeed engine of each component.
        folder: checkpoint folder; files go to a folder of the component's name inside.
        exclude_frozen: leave out weights that are not trained.
        keep: called with the content and the path; must have copied the tensors when it returns.
    """
    for component, engine in engines.items():
        with _capturing(engine, keep):
            engine.save_checkpoint(
                str(folder), tag=component, save_latest=False, exclude_frozen_parameters=exclude_frozen
            )
