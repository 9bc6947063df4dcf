"""Find clips whose bytes are the same."""

import hashlib
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from wan_dist.data.index import ShardEntry
from wan_dist.data.probe import WARNINGS, Reject
from wan_dist.data.reader import locate, read_json
from wan_dist.data.source_files import Listing, Source
from wan_dist.data.spans import FileSpan

_CHUNK_BYTES: Final = 1 << 20


def drop_same_content(listing: Listing) -> Listing:
    """Return the listing without clips that repeat an earlier one. Only files of equal size are read."""
    by_size: dict[int, list[Source]] = defaultdict(list)
    for source in listing.sources:
        by_size[source.num_bytes].append(source)
    first_of: dict[str, str] = {}
    rejects: list[Reject] = []
    for source in (s for group in by_size.values() if len(group) > 1 for s in group):
        first = first_of.setdefault(_digest(listing.root, source), source.path)
        if first != source.path:
            rejects.append(Reject("same_content", source.path, f"the same bytes as {first}; its captions are not kept"))
    dropped = {reject.path for reject in rejects}
    kept = tuple(source for source in listing.sources if source.path not in dropped)
    together = sorted((*listing.rejects, *rejects), key=lambda r: (r.path, r.code, r.hint))
    return replace(listing, sources=kept, rejects=tuple(together))


def same_content_warnings(out_dir: Path, entries: tuple[ShardEntry, ...]) -> list[Reject]:
    """Return a warning for every packed clip with the size and CRC-32 of an earlier one, which costs no reading."""
    marks: list[np.ndarray] = []
    for entry in entries:
        rows = np.load(out_dir / entry.index_name, mmap_mode="r", allow_pickle=False)
        marks.append(rows["media_size"].astype(np.uint64) << np.uint64(32) ^ rows["media_crc32"].astype(np.uint64))
    starts = np.cumsum([0, *map(len, marks)])
    _, first, group = np.unique(np.concatenate(marks), return_index=True, return_inverse=True)
    found: list[Reject] = []
    for number in np.flatnonzero(first[group] != np.arange(len(group))):
        shard = int(np.searchsorted(starts, number, "right")) - 1
        rows = np.load(out_dir / entries[shard].index_name, mmap_mode="r", allow_pickle=False)
        row = rows[number - starts[shard]]
        path = read_json(locate(out_dir / entries[shard].name, row, "json"))["path"]
        found.append(Reject("same_content", path, WARNINGS["same_content"]))
    return found


def _digest(root: Path, source: Source) -> str:
    digest = hashlib.sha256()
    path = root / (source.file or source.path)
    with FileSpan(path, source.offset, source.num_bytes).open() as stream:
        while data := stream.read(_CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()
