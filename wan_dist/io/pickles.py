"""The only place that reads pickles, which run whatever code they hold.

DeepSpeed's shards are pickles of its own classes, so `weights_only` cannot be used. They are read from checkpoints of
this user's runs only (`wan_dist.io.trust`); a test keeps `torch.load` out of every other module.
"""

from pathlib import Path
from typing import Any

import torch

from wan_dist.core.errors import CheckpointError


def load_shard(path: Path) -> Any:
    """Return what a DeepSpeed shard holds, its tensors memory-mapped: memory stays at what is touched.

    The caller vouches for the file: its checkpoint was written by a run of this user and its hashes verified.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing.") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: cannot be read as a DeepSpeed shard ({error}).") from error
