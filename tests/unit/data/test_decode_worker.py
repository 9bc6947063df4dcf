"""Decoding in processes: the same pixels, and a crash, hang or memory bomb that costs one clip."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.clips import read_numbers, write_clip
from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.decode import decode_clip
from wan_dist.data.decode_worker import open_decoder, serve

BUCKET = Bucket(80, 48, 5)
OPTIONS = {"fps": 24.0, "choice": 0.5, "crop_xy": (0.5, 0.5), "allow_duplicate_frames": False}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", 20).read_bytes()


def test_processes_give_the_same_pixels_and_errors(clip: bytes) -> None:
    decoder = open_decoder("process")
    try:
        for bucket in (BUCKET, Bucket(160, 96, 9), Bucket(40, 24, 1)):
            np.testing.assert_array_equal(
                decoder.decode(clip, bucket, name="a", **OPTIONS), decode_clip(clip, bucket, name="a", **OPTIONS)
            )
        for source, bucket, message in (
            (clip, Bucket(80, 48, 21), "sample x: .*too_short"),
            (b"", BUCKET, "empty_file"),
        ):
            with pytest.raises(DataError, match=message):
                decoder.decode(source, bucket, name="sample x", **OPTIONS)
    finally:
        decoder.close()
    with pytest.raises(DataError, match="has ended"):
        decoder.decode(clip, BUCKET, name="a", **OPTIONS)


def test_threads_share_the_processes(clip: bytes) -> None:
    decoder, found = open_decoder("process"), []

    def work() -> None:
        found.extend(read_numbers(decoder.decode(clip, BUCKET, name="a", **OPTIONS)) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    decoder.close()
    assert found == [read_numbers(decode_clip(clip, BUCKET, **OPTIONS))] * 9


@pytest.mark.parametrize(
    ("name", "message"),
    [("crash", "it crashed the decoder, twice"), ("hang", "it took over 4 s, twice"), ("exit", "it crashed")],
)
def test_what_ends_a_process_costs_one_clip(clip: bytes, name: str, message: str) -> None:
    # Long enough for a process to start on a busy machine.
    decoder = open_decoder(
        "process", timeout_s=4 if name == "hang" else 60, module="tests.unit.data.test_decode_worker"
    )
    try:
        with pytest.raises(DataError, match=f"{name}: cannot be decoded: {message}.*transcode"):
            decoder.decode(clip, BUCKET, name=name, **OPTIONS)
        # Its name is remembered, so a hang is not waited for in every epoch.
        started = time.monotonic()
        with pytest.raises(DataError, match=message):
            decoder.decode(clip, BUCKET, name=name, **OPTIONS)
        assert time.monotonic() - started < 0.5
        if name != "hang":
            assert len(decoder.decode(clip, BUCKET, name="good", **OPTIONS)) == 5
    finally:
        decoder.close()


def test_a_killed_process_is_started_again_without_blame(clip: bytes) -> None:
    decoder = open_decoder("process", timeout_s=30, module="tests.unit.data.test_decode_worker")
    try:
        assert len(decoder.decode(clip, BUCKET, name="killed-once", **OPTIONS)) == 5
    finally:
        decoder.close()
        Path(_MARK).unlink(missing_ok=True)


def test_memory_is_limited(tmp_path: Path) -> None:
    # 100 frames of 1920x1088 take 627 MB, in a process that may have half a gibibyte.
    clip = write_clip(tmp_path / "big.mp4", 100).read_bytes()
    decoder = open_decoder("process", memory_bytes=1 << 29)
    try:
        with pytest.raises(DataError, match="big: cannot be decoded: it needs more memory"):
            decoder.decode(clip, Bucket(1920, 1088, 100), name="big", **OPTIONS)
        small = write_clip(tmp_path / "a.mp4", 5).read_bytes()
        assert read_numbers(decoder.decode(small, BUCKET, name="small", **OPTIONS)) == [0, 1, 2, 3, 4]
    finally:
        decoder.close()


_MARK = f"/tmp/wan-dist-test-killed-once-{os.getuid()}"


def _misbehave(line: bytes) -> None:
    name = json.loads(line)[3]
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "hang":
        time.sleep(60)
    elif name == "exit":
        os._exit(0)
    elif name == "killed-once" and not Path(_MARK).exists():
        Path(_MARK).touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    import sys

    from wan_dist.data import decode_worker

    real = decode_worker._answer

    def answer(in_fd: int, out_fd: int, line: bytes) -> str:
        _misbehave(line)
        return real(in_fd, out_fd, line)

    decode_worker._answer = answer
    serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
