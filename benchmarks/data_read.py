"""Reading cached latents, against webdataset's decode loop and a plain readinto of the same bytes."""

import io
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import hardware, median_ratio, versions
from safetensors.torch import load
from torch import Tensor

from wan_dist.data.cache import FamilyPlan, exclusive, write_missing
from wan_dist.data.cache_sources import Encoded
from wan_dist.data.cached import CachedSamples
from wan_dist.data.clips import ClipDataset
from wan_dist.data.family import Family, open_family
from wan_dist.data.family_reader import FamilyReader
from wan_dist.data.index import MANIFEST_NAME, Manifest, ShardEntry, encode_index, open_shards, shards_digest
from wan_dist.data.shard_format import Member, write_file, write_shard

NUM_SHARDS = 4
BLOCK = 8
RULES = {"fps": 16.0, "num_frames": [81]}
FIRST_EPOCH = "wan_dist, first epoch"
CONFIG = {"z_dim": 16, "scale_factor_temporal": 4, "scale_factor_spatial": 8}


def run(quick: bool) -> None:
    """Measure and print a table."""
    torch.set_num_threads(1)
    # Latents of 81 frames at 832x480 px, and of the same length at 176x112 px.
    kinds = {"4.2 MB": ((832, 480), 16 if quick else 64), "0.15 MB": ((176, 96), 200 if quick else 2000)}
    print(f"{hardware()}; {versions('torch', 'webdataset', 'safetensors', 'zlib-ng')}")
    print("From the page cache, per CPU-second; medians of rounds, and of the ratios within each round")
    print(f"| {'latents':>8} | {'contestant':<26} | samples/CPU-s | MB/CPU-s | to webdataset | to readinto |")
    print("|---|---|---|---|---|---|")
    for name, (size, count) in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            _measure(name, Path(folder), size, count, num_rounds=2 if quick else 7, num_epochs=1 if quick else 4)


def _measure(name: str, folder: Path, size: tuple[int, int], count: int, num_rounds: int, num_epochs: int) -> None:
    shards, family = _write(folder, size, count)
    num_bytes = int(family.index(0)["size"][0])
    contestants: dict[str, Callable[[], Iterator[object]]] = {
        "readinto, shuffled": partial(_readinto, family),
        "webdataset, decode loop": partial(_webdataset, family),
        FIRST_EPOCH: partial(_ours, shards, family, size, 0),
        "wan_dist, later epochs": partial(_ours, shards, family, size, 0),
        "wan_dist, later, 2 threads": partial(_ours, shards, family, size, 2),
    }
    rates: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for number in range(num_rounds + 1):
        for contestant, start in contestants.items():
            # Every sample is searched for NaN where it is read first, so that epoch is a measurement of its own.
            skipped = 1 if contestant == FIRST_EPOCH else count + 1
            rate = _samples_per_cpu_s(start(), skipped, count if contestant == FIRST_EPOCH else count * num_epochs)
            if number:
                rates[contestant].append(rate)
    for contestant, found in rates.items():
        rate = statistics.median(found)
        ratios = [median_ratio(found, rates[peer]) for peer in ("webdataset, decode loop", "readinto, shuffled")]
        print(
            f"| {name:>8} | {contestant:<26} | {rate:.0f} | {rate * num_bytes / 1e6:.0f} "
            f"| {ratios[0]:.2f} | {ratios[1]:.2f} |",
            flush=True,
        )


def _samples_per_cpu_s(samples: Iterator[object], skipped: int, total: int) -> float:
    """CPU-seconds of all threads; not those of opening, which every contestant does before its first sample."""
    deque(islice(samples, skipped), maxlen=0)
    start_s = time.process_time()
    deque(islice(samples, total), maxlen=0)
    rate = total / (time.process_time() - start_s)
    if isinstance(samples, Generator):
        samples.close()
    return rate


def _readinto(family: Family) -> Iterator[object]:
    """The floor: every member into one buffer that is used again, no checksum, nothing parsed."""
    places = [(shard, row) for shard in range(NUM_SHARDS) for row in range(len(family.index(shard)))]
    rows = [family.index(shard) for shard in range(NUM_SHARDS)]
    buffer = memoryview(bytearray(int(rows[0]["size"].max())))
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        files = [stack.enter_context(family.tar_path(shard).open("rb", buffering=0)) for shard in range(NUM_SHARDS)]
        while True:
            for number in rng.permutation(len(places)):
                shard, row = places[number]
                files[shard].seek(int(rows[shard]["offset"][row]))
                yield files[shard].readinto(buffer[: int(rows[shard]["size"][row])])


def _webdataset(family: Family) -> Iterator[object]:
    from webdataset.compat import WebDataset

    urls = [str(family.tar_path(shard)) for shard in range(NUM_SHARDS)]
    dataset: Any = WebDataset(urls, shardshuffle=100, seed=0)
    samples = dataset.repeat().shuffle(16)
    return iter(samples.map(lambda sample: load(sample["safetensors"])["latents"]))


def _ours(shards: Path, family: Family, size: tuple[int, int], num_threads: int) -> Iterator[object]:
    """Sample order with its state, buckets, index, shape, checksum, and the search for NaN on first sight."""
    dataset = ClipDataset.open(shards, sizes=[size], **RULES)
    cached = CachedSamples([NUM_SHARDS], [FamilyReader(family)], None)
    order = dataset.order(BLOCK, 64, 0)

    def read(bucket: int, position: int) -> Tensor:
        ref = order.at(bucket, position)
        row = dataset.row_of(bucket, ref.shard, ref.index)
        return cached.read_latents(ref.shard, row, dataset.buckets[bucket], ("latents",))["latents"]

    if not num_threads:
        for block in order.blocks(0, 0):
            for place in range(BLOCK):
                yield read(block.bucket, block.first + place)
    with ThreadPoolExecutor(num_threads) as pool:
        ahead: deque[Future[Tensor]] = deque()
        for block in order.blocks(0, 0):
            ahead.extend(pool.submit(read, block.bucket, block.first + place) for place in range(BLOCK))
            while len(ahead) > BLOCK:
                yield ahead.popleft().result()


class _RandomLatents:
    """Latents of the right shape, without an encoder."""

    def __init__(self, size: tuple[int, int], rows: int) -> None:
        self._shape = (16, 21, size[1] // 8, size[0] // 8)
        self._rows = rows

    def num_clips(self, shard: int) -> int:
        return self._rows

    def empty(self) -> None:
        return None

    def samples(self, shard: int) -> Iterator[Encoded]:
        generator = torch.Generator().manual_seed(shard)
        for row in range(self._rows):
            yield Encoded(row, {"latents": torch.randn(self._shape, generator=generator).bfloat16()})


def _write(folder: Path, size: tuple[int, int], count: int) -> tuple[Path, Family]:
    """Write shards of clips that are never decoded, and a family of latents beside them."""
    entries = tuple(_write_clips(folder, shard, size, count // NUM_SHARDS) for shard in range(NUM_SHARDS))
    manifest = Manifest(
        digest=shards_digest(entries),
        plan_digest="",
        num_clips=sum(e.num_clips for e in entries),
        num_bytes=sum(e.num_bytes for e in entries),
        rejects={},
        shards=entries,
    )
    write_file(folder / MANIFEST_NAME, manifest.model_dump_json().encode())
    plan = FamilyPlan.of(open_shards(folder), {"kind": "latents", "vae": {"config": CONFIG}})
    with exclusive(plan):
        write_missing(plan, _RandomLatents(size, count // NUM_SHARDS), rank=0, world_size=1)
    return folder, open_family(plan.folder, "latents")


def _write_clips(folder: Path, shard: int, size: tuple[int, int], count: int) -> ShardEntry:
    rows: list[tuple[Any, ...]] = []
    with write_shard(folder / f"data-{shard:06d}.tar") as (writer, written):
        for number in range(count):
            key = f"clip-{shard}-{number:06d}"
            texts = (b'{"captions": ["a caption of about the length that people write"]}', b"a caption", b"a clip")
            members = [
                writer.add(f"{key}.{extension}", len(text), io.BytesIO(text))
                for extension, text in zip(("json", "txt", "mp4"), texts, strict=True)
            ]
            places = [value for m in [*members, Member(0, 0, 0)] for value in (m.offset, m.size, m.crc32)]  # no mask
            rows.append((key.encode(), b"mp4", *places, *size, 81, 16.0, 5.06, 0.0625))
    index = write_file(folder / f"data-{shard:06d}.idx.npy", encode_index(rows))
    return ShardEntry(
        name=f"data-{shard:06d}.tar",
        num_clips=count,
        num_bytes=written[0].num_bytes,
        sha256=written[0].sha256,
        index_name=f"data-{shard:06d}.idx.npy",
        index_bytes=index.num_bytes,
        index_sha256=index.sha256,
    )
