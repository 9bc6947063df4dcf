"""A rank's random state as a file: torch, accelerator, Python and NumPy."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from wan_dist.core.rng import seed_of


def file_name(rank: int) -> str:
    """Return the file of a rank's random state in a checkpoint."""
    return f"rng-{rank:05d}.safetensors"


def snapshot() -> dict[str, Tensor]:
    """Return this process's random states, each [n] uint8."""
    states = {"cpu": torch.get_rng_state(), "python": _as_bytes(random.getstate())}
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states["numpy"] = _as_bytes([name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)])
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(folder: Path, rank: int) -> None:
    """Continue this rank's random state; a rank that the checkpoint does not know forks one off rank 0's.

    Nothing that is trained depends on these states: sigma, noise and crops are keyed by seed and position.
    """
    own = folder / file_name(rank)
    states = load_file(own if own.is_file() else folder / file_name(0))
    torch.set_rng_state(states["cpu"])
    version, internal, gauss_next = json.loads(bytes(states["python"].tolist()))
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = json.loads(bytes(states["numpy"].tolist()))
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if not own.is_file():
        torch.manual_seed(seed_of("rank", rank, int(torch.randint(2**31, ()))))


def _as_bytes(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
