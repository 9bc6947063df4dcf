"""Streaming tars of other programs: ranks apart, bad samples left out, nothing unsafe opened."""

import io
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from tests.clips import read_numbers, write_clip
from tests.servers import serve
from wan_dist.core.errors import DataError
from wan_dist.data.assign import ClipRules
from wan_dist.data.decode_worker import open_decoder
from wan_dist.data.stream import ClipStream

RULES = ClipRules(((80, 48),), (5,), 24.0, "head", "center", False, False)


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for shard in range(2):
        with tarfile.open(folder / f"data-{shard:06d}.tar", "w") as tar:
            for number in (2 * shard, 2 * shard + 1):
                clip = write_clip(folder / "x.mp4", 6, first=10 * number).read_bytes()
                for extension, content in (("mp4", clip), ("txt", f"caption {number}".encode())):
                    info = tarfile.TarInfo(f"{number}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            info = tarfile.TarInfo(f"bad{shard}.mp4")
            tar.addfile(info)
    return folder


def open_stream(*names: Path | str) -> ClipStream:
    return ClipStream(list(names), RULES, open_decoder("thread"))


def captions(stream: ClipStream, count: int, rank: int = 0, world_size: int = 1) -> list[str]:
    return [clip.captions[0] for clip in islice(stream.clips(rank, world_size, 3), count)]


def test_a_pass_gives_every_usable_clip_once(tars: Path) -> None:
    stream = open_stream(tars)
    clips = list(islice(stream.clips(0, 1, 3), 8))
    first, second = clips[:4], clips[4:]
    wanted = {f"caption {n}" for n in range(4)}
    assert {c.captions[0] for c in first} == {c.captions[0] for c in second} == wanted
    assert stream.rejects["no_caption"] == 4
    number = int(first[0].captions[0].split()[1])
    assert read_numbers(stream.frames(first[0], 0.0, (0.5, 0.5))) == [10 * number + k for k in range(5)]


def test_ranks_read_different_clips(tars: Path) -> None:
    names = str(tars / "data-{000000..000001}.tar")
    halves = [captions(open_stream(names), 2, rank, 2) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == [f"caption {n}" for n in range(4)]
    # More ranks than tars: samples are dealt out.
    thirds = [captions(open_stream(names), 1, rank, 3) for rank in range(2)]
    assert len({c for part in thirds for c in part}) == 2


def test_streams_come_over_http_without_a_shell(tars: Path) -> None:
    with serve(tars) as server:
        found = captions(open_stream(f"{server.url}/data-000001.tar"), 2)
    assert sorted(found) == ["caption 2", "caption 3"]


def test_unsafe_and_missing_names_are_refused(tars: Path, tmp_path: Path) -> None:
    for name, message in (
        ("pipe:touch pwned", "shards are read from"),
        (str(tars / "gone.tar"), "no such tar"),
        (str(tmp_path), "no such tar"),
    ):
        with pytest.raises(DataError, match=message):
            open_stream(name)
    (tmp_path / "broken.tar").write_bytes(b"x" * 4096)
    with pytest.raises(DataError, match="no clip that can be used"):
        captions(open_stream(tmp_path / "broken.tar"), 1)


def test_webdataset_is_imported_in_its_safe_mode(tars: Path) -> None:
    code = (
        "import sys; from wan_dist.data import stream; assert 'webdataset' not in sys.modules;"
        "stream._secure_webdataset(); import webdataset.utils; assert webdataset.utils.enforce_security"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_names_with_dots_find_their_captions(tars: Path, tmp_path: Path) -> None:
    with tarfile.open(tars / "data-000000.tar") as source, tarfile.open(tmp_path / "dotted.tar", "w") as tar:
        for name, renamed in (("0.mp4", "a.b.c.mp4"), ("0.txt", "a.b.c.txt")):
            info = tarfile.TarInfo(renamed)
            content = source.extractfile(name)
            assert content is not None
            info.size = source.getmember(name).size
            tar.addfile(info, content)
    assert captions(open_stream(tmp_path / "dotted.tar"), 1) == ["caption 0"]
