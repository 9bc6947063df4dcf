"""Sizes as people write them."""

import re

from wan_dist.core.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: str, option: str) -> int:
    """Return a size such as 5GB or 500MB in bytes.

    Args:
        text: a number and a unit.
        option: what to call it in messages.

    Raises:
        ConfigError: not a size above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    size = int(float(match[1]) * _UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise ConfigError(f"{option} {text!r} is no size; write a number and MB, GB, MiB or GiB, such as 5GB.")
    return size
