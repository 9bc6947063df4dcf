"""Errors that a user can cause. The command line prints them as one line, without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class WanDistError(Exception):
    """Base of every error whose message is written for the user.

    Attributes:
        exit_code: the process exit status, 1 for a failure and 2 for wrong usage or configuration.
    """

    exit_code = 1


class ConfigError(WanDistError):
    """A configuration file, an override or a command line option is wrong."""

    exit_code = 2


class RequestError(WanDistError):
    """A generation request is wrong."""

    exit_code = 2


class DataError(WanDistError):
    """Clips, captions or shards are missing, damaged or unfit for the configuration."""


class StorageError(DataError):
    """Shards cannot be reached, or changed while they were read: no sample is to blame, so none is replaced."""


class UnfitDataError(DataError):
    """Data that are whole and cannot be what the configuration asks for: one of the two must change."""

    exit_code = 2


class NotFiniteError(UnfitDataError):
    """Latents or text embeddings hold NaN or infinity: whatever made them is broken, so no sample is replaced."""


class ModelError(WanDistError):
    """A model folder or weight file is missing, damaged or of another kind than stated."""


@contextmanager
def before_first_step() -> Iterator[None]:
    """Give what a configuration names, and what is wrong with it, the status of a wrong configuration."""
    try:
        yield
    except (DataError, ModelError) as error:
        if not isinstance(error, StorageError):
            error.exit_code = ConfigError.exit_code
        raise


class CheckpointError(WanDistError):
    """A run folder or checkpoint is missing, damaged or cannot be continued as asked."""


class LaunchError(WanDistError):
    """Ranks could not be started, or ended with a failure."""


class TrainingError(WanDistError):
    """Training cannot go on: the loss is not finite, or the ranks do not agree."""
