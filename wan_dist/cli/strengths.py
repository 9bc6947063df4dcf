"""Strengths of LoRA files on a command line."""

import math
from pathlib import Path

from wan_dist.core.errors import ConfigError


def with_strengths(option: str, files: list[Path] | None, given: list[float] | None) -> list[tuple[Path, float]]:
    """Return each file with its strength.

    Args:
        option: that gave the strengths, for messages.
        files: in the order of the command line.
        given: one for each, one for all, or none, which is 1.

    Raises:
        ConfigError: another number of them, or one that is no finite number.
    """
    files, given = files or [], given or [1.0]
    if not all(map(math.isfinite, given)):
        raise ConfigError(f"{option}: must be finite numbers, found {', '.join(map(str, given))}.")
    if len(given) == 1:
        given = given * len(files)
    if len(given) != len(files):
        raise ConfigError(f"{option}: {len(given)} values for {len(files)} files; give one for each, or one for all.")
    return list(zip(files, given, strict=True))
