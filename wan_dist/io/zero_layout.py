"""Where each element of each parameter lies in the ranks' flat tensors, for every ZeRO stage.

A rank holds one flat tensor per group. Segments say which elements of which parameter lie where in it, so that the
same few lines read a checkpoint, export it, and cut it anew for another number of ranks.
Source: deepspeed 0.19.8, `utils/zero_to_fp32.py`, `runtime/zero/stage3.py`, `runtime/zero/stage_1_and_2.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of elements of one parameter in a rank's flat tensor.

    Attributes:
        name: the parameter.
        start: first element of the flattened parameter.
        offset: where it lies in the rank's flat tensor.
        count: number of elements.
    """

    name: str
    start: int
    offset: int
    count: int


@dataclass(frozen=True)
class Group:
    """One flat tensor per rank.

    Attributes:
        segments: by rank, in order of offset.
        sizes: elements of each rank's flat tensor, padding included.
    """

    segments: tuple[tuple[Segment, ...], ...]
    sizes: tuple[int, ...]


def partition_each(counts: Mapping[str, int], world_size: int) -> Group:
    """Return the layout of a ZeRO-3 sub-group: every parameter is cut over all ranks, the last pieces padded.

    Args:
        counts: elements of each parameter, in order.
        world_size: number of ranks.
    """
    segments: list[list[Segment]] = [[] for _ in range(world_size)]
    offset = 0
    for name, count in counts.items():
        part = -(-count // world_size)
        for rank in range(world_size):
            held = max(0, min(part, count - rank * part))
            segments[rank].append(Segment(name, rank * part if held else count, offset, held))
        offset += part
    return Group(tuple(map(tuple, segments)), (offset,) * world_size)


def partition_whole(counts: Mapping[str, int], paddings: Sequence[int], sizes: Sequence[int]) -> Group:
    """Return the layout of a ZeRO-1 or 2 group: the parameters end to end, cut into one stretch per rank.

    Args:
        counts: elements of each parameter, in order.
        paddings: unused elements after each parameter.
        sizes: elements of each rank's stretch.
    """
    segments: list[list[Segment]] = [[] for _ in sizes]
    first = 0
    spans: list[tuple[str, int, int]] = []
    for (name, count), padding in zip(counts.items(), paddings, strict=True):
        spans.append((name, first, first + count))
        first += count + padding
    low = 0
    for rank, size in enumerate(sizes):
        high = low + size
        for name, begin, end in spans:
            start, stop = max(begin, low), min(end, high)
            if start < stop:
                segments[rank].append(Segment(name, start - begin, start - low, stop - start))
        low = high
    return Group(tuple(map(tuple, segments)), tuple(sizes))


def pieces_of(groups: Sequence[Group]) -> dict[str, list[tuple[int, int, Segment]]]:
    """Return for every parameter its (group, rank, segment) triples, in order of its elements; empty ones left out."""
    found: dict[str, list[tuple[int, int, Segment]]] = {}
    for number, rank, segment in _all_segments(groups):
        pieces = found.setdefault(segment.name, [])
        if segment.count:
            pieces.append((number, rank, segment))
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece[2].start)
    return found


def _all_segments(groups: Sequence[Group]) -> Iterator[tuple[int, int, Segment]]:
    for number, group in enumerate(groups):
        for rank, segments in enumerate(group.segments):
            for segment in segments:
                yield number, rank, segment
