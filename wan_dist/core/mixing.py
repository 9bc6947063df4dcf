"""Interleave streams in proportion to their rates, evenly and without history."""

from bisect import bisect_left
from collections.abc import Sequence


class Interleave:
    """An endless merge of streams: every stretch of it holds each stream in proportion to its rate, give or take one.

    Item k of a stream with rate r stands at time (2k + 1) / (2r), and items are merged by time. All arithmetic is in
    integers, so the same item stands at the same place on every machine.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        """Fix the rates: not negative, and not all 0. Only their ratios matter."""
        if min(rates) < 0 or not any(rates):
            raise ValueError(f"rates must not be negative and not all 0, got {list(rates)}")
        self._rates = tuple(rates)
        self._total = sum(rates)

    def at(self, position: int) -> tuple[int, int]:
        """Return the stream whose item stands at `position` (from 0), and the number of that item in its stream."""
        for stream, rate in enumerate(self._rates):
            if not rate:
                continue
            # A stream runs ahead of or behind its share by less than the number of streams.
            first = max(0, position * rate // self._total - len(self._rates) - 1)
            last = position * rate // self._total + len(self._rates) + 2
            item = first + bisect_left(
                range(first, last), position, key=lambda k, stream=stream: self._place(stream, k)
            )
            if self._place(stream, item) == position:
                return stream, item
        raise AssertionError(f"no stream has an item at {position}")

    def _place(self, stream: int, item: int) -> int:
        """Return where an item stands in the merge: how many items come before it."""
        rate = self._rates[stream]
        place = 0
        for other, other_rate in enumerate(self._rates):
            # Items k' of the other stream with (2k' + 1) / other_rate before (2 item + 1) / rate; at equal times the
            # stream of the lower number comes first.
            numerator = (2 * item + 1) * other_rate - rate
            before = numerator // (2 * rate) + 1 if other < stream else -(-numerator // (2 * rate))
            place += max(0, before)
        return place
