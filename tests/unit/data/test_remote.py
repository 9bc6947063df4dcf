"""Shards on other machines: a real web server that fails on demand, and fsspec's file systems."""

import io
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from tests.clips import read_numbers, write_clip
from tests.servers import RangeServer, cut, reset, serve, stall, status
from wan_dist.core.errors import DataError, StorageError
from wan_dist.data.clips import ClipDataset
from wan_dist.data.disk_cache import CachedStore
from wan_dist.data.fsspec_store import FsspecStore
from wan_dist.data.http_store import HttpStore
from wan_dist.data.index import open_shards, open_unchecked
from wan_dist.data.mixture import ShardSource
from wan_dist.data.pack import pack_clips
from wan_dist.data.reader import locate, read_member
from wan_dist.data.retry import RetryPolicy, TransientError, retry
from wan_dist.data.stores import CacheLimits, LocalStore, open_store
from wan_dist.data.verify import verify_shards

QUICK = RetryPolicy(num_tries=4, first_wait_s=0.01, max_wait_s=0.05)
RULES = {"sizes": [(80, 48)], "num_frames": [5], "fps": 24.0}
CENTER = (0.5, 0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    (folder / "clips").mkdir()
    for number in range(3):
        write_clip(folder / "clips" / f"{number}.mp4", 9, first=20 * number)
        (folder / "clips" / f"{number}.txt").write_text(f"caption {number}")
    pack_clips(folder / "clips", folder / "shards", shard_clips=2)
    return folder / "shards"


@pytest.fixture
def server(shards: Path, tmp_path: Path) -> Iterator[RangeServer]:
    shutil.copytree(shards, tmp_path / "served")
    with serve(tmp_path / "served") as running:
        yield running


def frames_of(where: str | Path, cache: CacheLimits | None = None) -> list[tuple[str, list[int]]]:
    dataset = ClipDataset.open([ShardSource(where, cache=cache)], **RULES)  # type: ignore[arg-type]
    found = []
    for shard, count in enumerate(dataset.counts[:, 0]):
        for index in range(count):
            sample = dataset.load(0, shard, index, choice=0.0, crop_xy=CENTER)
            found.append((sample.captions[0], read_numbers(sample.frames)))
    return found


def test_every_kind_of_store_gives_the_same_samples(shards: Path, server: RangeServer, tmp_path: Path) -> None:
    wanted = [(f"caption {n}", [20 * n + k for k in range(5)]) for n in range(3)]
    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    cache = CacheLimits(tmp_path / "cache", 1 << 30)
    for where in (shards, server.url, f"file://{shards}", "memory://bucket/shards"):
        assert frames_of(where) == wanted
    assert ClipDataset.open(shards, **RULES).digest == ClipDataset.open(server.url, **RULES).digest  # type: ignore[arg-type]
    assert frames_of(server.url, cache) == wanted
    before = len(server.requests)
    assert frames_of(server.url, cache) == wanted
    # Kept on the disk: only sizes and ETags were asked for again, a byte each.
    assert all("bytes=0-0" in request for request in server.requests[before:])


def test_a_lost_index_of_a_remote_shard_is_made_anew(server: RangeServer, caplog: pytest.LogCaptureFixture) -> None:
    wanted = ClipDataset.open(server.url, **RULES)  # type: ignore[arg-type]
    index = server.folder / "data-000000.idx.npy"
    content = index.read_bytes()
    index.unlink()
    opened = open_shards(server.url)
    np.testing.assert_array_equal(opened.index(0), np.load(io.BytesIO(content)))
    assert "data-000000.idx.npy is missing; making it anew" in caplog.text
    assert not index.exists()
    before = len(server.requests)
    opened.index(0)
    assert len(server.requests) == before
    assert frames_of(server.url) == [(f"caption {n}", [20 * n + k for k in range(5)]) for n in range(3)]
    assert ClipDataset.open(server.url, **RULES).digest == wanted.digest  # type: ignore[arg-type]
    # A shard that is not the one in the manifest gives no index.
    tar = server.folder / "data-000000.tar"
    damaged = bytearray(tar.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    tar.write_bytes(damaged)
    with pytest.raises(DataError, match="the one made anew differs"):
        open_shards(server.url).index(0)


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """The shards in `s3://clips/shards` of an object store on this machine."""
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("clips")
    for path in shards.iterdir():
        files.pipe_file(f"clips/shards/{path.name}", path.read_bytes())
    yield files
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def test_s3_is_read_by_ranges_and_replacement_is_noticed(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    where, cache = "s3://clips/shards", CacheLimits(tmp_path / "cache", 1 << 30)
    wanted = [(f"caption {n}", [20 * n + k for k in range(5)]) for n in range(3)]
    assert frames_of(where) == wanted
    assert frames_of(where, cache) == wanted
    assert verify_shards(open_shards(where)) == []
    bucket.rm_file("clips/shards/data-000001.idx.npy")
    assert frames_of(where) == wanted
    opened = open_shards(where)
    row = opened.index(1)[0]
    tar = bucket.cat_file("clips/shards/data-000001.tar")
    bucket.pipe_file("clips/shards/data-000001.tar", tar[:-10_240])
    wrong_size = f"has {len(tar) - 10_240} bytes instead of {len(tar)}"
    assert wrong_size in {damage.what for damage in verify_shards(open_unchecked(where))}
    with pytest.raises(StorageError, match="bytes instead of"):
        read_member(locate(open_shards(where).tar(1), row, "media"))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        open_shards("s3://clips/elsewhere")
    with pytest.raises((DataError, StorageError), match="s3://no-such-bucket"):
        open_shards("s3://no-such-bucket/shards")


def test_only_the_bytes_of_a_sample_are_fetched(server: RangeServer) -> None:
    dataset = ClipDataset.open(server.url, **RULES)  # type: ignore[arg-type]
    server.requests.clear()
    dataset.load(0, 0, 0, choice=0.0, crop_xy=CENTER)
    row = open_shards(server.folder).index(0)[0]
    first, size = int(row["media_offset"]), int(row["media_size"])
    assert server.requests[-1] == f"data-000000.tar bytes={first}-{first + size - 1}"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("429", status(429, Retry_After="0")),
        ("503", status(503)),
        ("500", status(500)),
        ("cut", cut),
        ("reset", reset),
        ("stall", stall(0.6)),
    ],
)
def test_passing_failures_are_retried(server: RangeServer, name: str, fault: object) -> None:
    store = HttpStore(server.url, policy=QUICK, timeout_s=0.25)
    whole = (server.folder / "data-000000.tar").read_bytes()
    assert store.size("data-000000.tar") == len(whole)
    server.faults[:] = [fault, fault]  # type: ignore[list-item]
    assert store.read_range("data-000000.tar", 512, 4000) == whole[512:4512]
    assert len(server.requests) == 4


def test_lasting_failures_stop_with_what_happened(server: RangeServer) -> None:
    store = HttpStore(server.url, policy=QUICK, timeout_s=0.25)
    server.faults[:] = [status(503)] * 9
    with pytest.raises(StorageError, match=r"data-000000\.tar: the server answers 503, 4 times") as caught:
        store.size("data-000000.tar")
    assert "\n" not in str(caught.value)
    server.faults.clear()
    server.faults[:] = [status(403), status(200, Content_Length="5")]
    with pytest.raises(StorageError, match="answers 403: not allowed"):
        store.size("data-000000.tar")
    with pytest.raises(StorageError, match="ignores range requests"):
        store.size("data-000000.tar")
    with pytest.raises(FileNotFoundError):
        store.size("gone.tar")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        open_shards(f"{server.url}/nowhere")
    with pytest.raises(StorageError, match="times; check the network"):
        HttpStore("http://127.0.0.1:9", policy=QUICK).size("x")


def test_a_trickle_is_given_up(server: RangeServer) -> None:
    def trickle(handler: object) -> bool:
        import time

        handler.answer(206, b"x" * 4000, {"Content-Range": "bytes 0-3999/4000", "ETag": '"t"'}, send=0)  # type: ignore[attr-defined]
        for _ in range(40):
            time.sleep(0.02)
            try:
                handler.wfile.write(b"x")  # type: ignore[attr-defined]
                handler.wfile.flush()  # type: ignore[attr-defined]
            except OSError:
                break
        return True

    store = HttpStore(server.url, policy=RetryPolicy(1), timeout_s=0.2, min_bytes_per_s=1e4)
    server.faults[:] = [trickle]
    with pytest.raises(StorageError, match=r"only \d+ bytes in|bytes came|IncompleteRead|broken"):
        store.read_range("data-000000.tar", 0, 4000)


def test_a_changed_object_is_an_error_and_no_bad_sample(server: RangeServer) -> None:
    dataset = ClipDataset.open(server.url, **RULES)  # type: ignore[arg-type]
    dataset.load(0, 0, 0, choice=0.0, crop_xy=CENTER)
    server.etags["data-000000.tar"] = '"another"'
    with pytest.raises(StorageError, match=r'data-000000\.tar: changed while it was read: .*"another"'):
        dataset.load(0, 0, 1, choice=0.0, crop_xy=CENTER)
    # Replaced before the start by one of another size.
    with (server.folder / "data-000001.tar").open("ab") as stream:
        stream.write(bytes(512))
    with pytest.raises(StorageError, match=r"data-000001\.tar: has \d+ bytes instead of \d+"):
        dataset.load(0, 1, 0, choice=0.0, crop_xy=CENTER)
    # Another content of the same size is a matter for the checksum.
    fresh = ClipDataset.open(server.url, **RULES)  # type: ignore[arg-type]
    content = (server.folder / "data-000000.tar").read_bytes()
    (server.folder / "data-000000.tar").write_bytes(bytes(len(content)))
    with pytest.raises(DataError, match="damaged") as caught:
        fresh.load(0, 0, 0, choice=0.0, crop_xy=CENTER)
    assert not isinstance(caught.value, StorageError)


def test_object_storage_notices_replacement_and_cuts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(1000))
    store = FsspecStore(f"file://{tmp_path}", policy=QUICK)
    assert store.read_range("a", 10, 5000) == bytes(990)
    (tmp_path / "a").write_bytes(bytes(500))
    with pytest.raises(StorageError, match="changed while it was read: 1000 bytes"):
        store.read_range("a", 0, 1000)
    with pytest.raises(FileNotFoundError):
        store.read_range("b", 0, 1)


def test_unknown_urls_are_refused() -> None:
    for url in ("pipe:cat x", "ftp://host/x", "exec://x"):
        with pytest.raises(DataError, match="shards are read from a folder or from http://"):
            open_store(url)


def test_the_cache_keeps_to_its_size_and_mends_itself(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    content = np.random.default_rng(0).bytes(10_000)
    (source / "a").write_bytes(content)
    cache = CachedStore(LocalStore(source), tmp_path / "cache", 3500)
    for start in range(0, 10_000, 1000):
        assert cache.read_range("a", start, 1000) == content[start : start + 1000]
        assert sum(p.stat().st_size for p in (tmp_path / "cache").iterdir()) <= 3500
    kept = max((tmp_path / "cache").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    assert cache.read_range("a", 9000, 1000) == content[9000:]
    # A changed source is another version.
    (source / "a").write_bytes(bytes(10_000))
    os.utime(source / "a", ns=(1, 1))
    assert cache.read_range("a", 9000, 1000) == bytes(1000)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a").write_bytes(bytes(2000))
    cache = CachedStore(LocalStore(tmp_path / "s"), tmp_path / "cache", 2000)
    cache.read_range("a", 0, 100)
    first = next((tmp_path / "cache").iterdir())
    cache.read_range("a", 100, 100)
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, ns=(1, 1))
    for start in range(200, 2000, 100):
        cache.read_range("a", 0, 100)  # used again and again, so never the oldest
        cache.read_range("a", start, 100)
    assert first.exists()
    assert len(list((tmp_path / "cache").glob("*.part"))) == 17


def test_readers_share_one_pool(server: RangeServer) -> None:
    store = HttpStore(server.url, policy=QUICK)
    whole = (server.folder / "data-000000.tar").read_bytes()
    wrong: list[int] = []

    def read(number: int) -> None:
        for start in range(number, 4000, 400):
            if store.read_range("data-000000.tar", start, 100) != whole[start : start + 100]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_waits_grow_and_are_spread() -> None:
    waits: list[float] = []

    def fail() -> None:
        raise TransientError("no", 3.0 if len(waits) == 2 else None)

    with pytest.raises(StorageError, match="x: no, 5 times"):
        retry(fail, "x", RetryPolicy(5, 1.0, 4.0), waits.append)
    assert [low <= w <= high for w, low, high in zip(waits, (0.5, 1, 3, 2), (1, 2, 4, 4), strict=True)] == [True] * 4
