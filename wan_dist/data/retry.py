"""Try again what a network may spoil, with growing pauses."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from wan_dist.core.errors import StorageError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class TransientError(Exception):
    """Something that may go well the next time.

    Attributes:
        wait_s: seconds that the server asks to wait, None if it does not.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how patiently.

    Attributes:
        num_tries: tries in all.
        first_wait_s: seconds before the second try; doubled with every further one.
        max_wait_s: longest wait, seconds, also where the server asks for a longer one.
    """

    num_tries: int = 8
    first_wait_s: float = 0.5
    max_wait_s: float = 60.0


def retry(call: Callable[[], T], name: str, policy: RetryPolicy, pause: Callable[[float], None] = time.sleep) -> T:
    """Return what `call` returns, called again after a `TransientError`.

    Args:
        call: what is tried.
        name: how messages name it.
        policy: how often and how patiently.
        pause: waits for some seconds.
    Raises:
        StorageError: the last try failed too.
    """
    for number in range(1, policy.num_tries + 1):
        try:
            return call()
        except TransientError as error:
            if number == policy.num_tries:
                raise StorageError(
                    f"{name}: {error}, {number} times; check the network and the storage, then resume."
                ) from error
            wait_s = min(policy.first_wait_s * 2 ** (number - 1), policy.max_wait_s)
            # Spread, so that a thousand readers that were turned away together do not come back together.
            wait_s *= random.uniform(0.5, 1.0)  # no sample depends on it
            wait_s = min(max(wait_s, error.wait_s or 0.0), policy.max_wait_s)
            logger.warning("%s: %s; trying again in %.1f s", name, error, wait_s)
            pause(wait_s)
    raise AssertionError("num_tries is at least 1")
