"""Random numbers keyed by position, so that they depend on neither the number of ranks nor on history.

Everything random about a training sample (crop, caption, dropout, sigma, noise) is drawn from a generator whose
seed is a hash of where the sample stands: `seed_of(seed, "noise", bucket, position)`. NumPy's streams are not
stable between versions, hence our own hash.
"""

import hashlib

import torch

_MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """Return a well mixed 64-bit value of `x`.

    Source: SplitMix64, Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195.
    """
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = mix(state ^ mix(part & _MASK))
    return state >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `seed_of(*parts)`."""
    return torch.Generator(device="cpu").manual_seed(seed_of(*parts))


def uniform(*parts: int | str) -> float:
    """Return one number in [0, 1) that depends on the parts only."""
    return mix(seed_of(*parts)) / 2.0**64
