"""Tables, line lists, tars, concepts and odd names: recognised, joined with their captions, and every mismatch told."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.clips import write_clip
from wan_dist.core.errors import ConfigError, DataError
from wan_dist.data.index import open_shards
from wan_dist.data.pack import pack_clips
from wan_dist.data.reader import locate, read_json, read_member
from wan_dist.data.source_files import Listing
from wan_dist.data.sources import list_sources

ROWS = [
    {"video": "a.mp4", "text": "one"},
    {"video": "sub/b.mp4", "text": 'two, "quoted"\nand more'},
    {"video": "a.mp4", "text": "three"},
    {"video": "gone.mp4", "text": "x"},
    {"video": "SUB/B.mp4", "text": "x"},
    {"video": "c.mp4", "text": ""},
]


def folder_of(tmp_path: Path, files: dict[str, str | bytes]) -> Path:
    folder = tmp_path / "clips"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {s.path: s.captions for s in listing.sources}


def rejected(listing: Listing) -> dict[str, str]:
    return {r.path: r.code for r in listing.rejects}


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'wan_dist[parquet]'")
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as stream:  # as spreadsheets save it, with its mark
            writer = csv.DictWriter(
                stream, list(rows[0]), dialect=csv.excel_tab if path.suffix == ".tsv" else csv.excel
            )
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_tables_are_joined_with_files(tmp_path: Path, suffix: str) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("a.mp4", "sub/b.mp4", "c.mp4"), b"1"))
    write_table(folder / f"metadata{suffix}", ROWS)
    listing = list_sources(folder)
    assert captions(listing) == {"a.mp4": ("one", "three"), "sub/b.mp4": ('two, "quoted"\nand more',)}
    assert sorted(rejected(listing).values()) == ["bad_row", "no_caption", "row_without_file", "row_without_file"]
    assert any("the file is sub/b.mp4" in r.hint for r in listing.rejects)
    assert captions(list_sources(folder / f"metadata{suffix}")) == captions(listing)
    assert captions(list_sources(folder, folder / f"metadata{suffix}")) == captions(listing)


def test_names_that_differ_only_in_spelling_are_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"cafe\u0301.mp4": b"1", "metadata.csv": "file,caption\ncaf\xe9.mp4,x\n"})
    (tmp_path / "outside.mp4").write_bytes(b"1")
    hints = {r.path: r.hint for r in list_sources(folder).rejects}
    assert "accents agree" in hints["metadata.csv:2"]
    (folder / "metadata.csv").write_text("file,caption\n../outside.mp4,x\n")
    assert "lies outside" in {r.path: r.hint for r in list_sources(folder).rejects}["metadata.csv:2"]


def test_json_may_map_files_to_captions(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("a.mp4", "b.mp4", "c.mp4"), b"1"))
    table = {"a.mp4": "one", "b.mp4": ["two", "three"], "c.mp4": {"prompt": "four"}}
    (folder / "metadata.json").write_text(json.dumps(table))
    assert captions(list_sources(folder)) == {"a.mp4": ("one",), "b.mp4": ("two", "three"), "c.mp4": ("four",)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file,caption\na.mp4,caf\xe9".encode("latin-1"), "not UTF-8 at byte 22"),
        ("metadata.json", b"{", "not JSON"),
        ("metadata.json", b"3", "neither a list"),
        ("metadata.parquet", b"PAR1", "Parquet"),
        ("captions.xlsx", b"1", r"tables of captions are \.csv"),
    ],
)
def test_broken_tables_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = folder_of(tmp_path, {"a.mp4": b"1", name: content})
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        list_sources(folder, folder / name)
    assert "\n" not in str(caught.value)


def test_two_tables_ask_for_a_choice(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.mp4": b"1", "metadata.csv": "file,caption\na.mp4,x", "metadata.jsonl": ""})
    with pytest.raises(DataError, match=r"metadata\.csv, metadata\.jsonl; name the caption table with --captions"):
        list_sources(folder)


def test_lists_of_lines(tmp_path: Path) -> None:
    files = {"v/a.mp4": b"1", "v/b.mp4": b"1", "videos.txt": "v/a.mp4\r\nv/b.mp4\r\n", "prompts.txt": "one\ntwo\n"}
    folder = folder_of(tmp_path, dict(files))
    assert captions(list_sources(folder)) == {"v/a.mp4": ("one",), "v/b.mp4": ("two",)}
    (folder / "prompts.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"videos\.txt has 2 lines, prompts\.txt 1"):
        list_sources(folder)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def video2dataset(folder: Path, clip: bytes) -> Path:
    """A folder as video2dataset leaves it, with PAX headers and files that are no samples."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for key in ("000000000", "000000001"):
            add(tar, f"{key}.json", json.dumps({"caption": None, "key": key, "status": "success"}).encode())
            add(tar, f"{key}.mp4", clip)
            add(tar, f"{key}.txt", f"caption {key}".encode())
        add(tar, "000000002.json", b'{"status": "failed_to_download"}')
    with tarfile.open(folder / "00001.tar", "w") as tar:
        add(tar, "000000000.mp4", clip)
        add(tar, "000000000.json", b'{"caption": "from json"}')
        add(tar, "two.1.mp4", clip)
        add(tar, "two.2.mp4", clip)
        add(tar, "silent.mp4", clip)
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text("{}")
    return folder


def test_existing_tars_keep_their_bytes(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", 9).read_bytes()
    folder = video2dataset(tmp_path / "tars", clip)
    result = pack_clips(folder, tmp_path / "out")
    assert result.rejects == {"no_caption": 1, "several_clips": 1}
    shards = open_shards(tmp_path / "out")
    rows = list(shards.index(0))
    assert [row["key"].decode() for row in rows] == [
        "00000_tar_000000000",
        "00000_tar_000000001",
        "00001_tar_000000000",
    ]
    texts = [read_json(locate(shards.tar_path(0), row, "json"))["captions"] for row in rows]
    assert texts == [["caption 000000000"], ["caption 000000001"], ["from json"]]
    assert all(read_member(locate(shards.tar_path(0), row, "media")) == clip for row in rows)


def test_our_own_shards_can_be_packed_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.json": '{"caption": ["one", "two"]}'})
    write_clip(folder / "a.mp4", 9)
    pack_clips(folder, tmp_path / "first")
    again = list_sources(tmp_path / "first" / "data-000000.tar")
    assert captions(again) == {"data-000000.tar/a.mp4": ("one", "two")}
    assert pack_clips(tmp_path / "first", tmp_path / "second").num_clips == 1


@pytest.mark.parametrize("keep", [0.5, 0.9, "boundary"])
def test_cut_tars_are_told(tmp_path: Path, keep: float | str) -> None:
    folder = video2dataset(tmp_path / "tars", b"clip" * 1000)
    tar = folder / "00000.tar"
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    size = members[3].offset if keep == "boundary" else int(members[-1].offset_data * float(keep))
    os.truncate(tar, size)
    listing = list_sources(folder)
    assert rejected(listing)["00000.tar"] == "bad_tar"
    assert "00001.tar/000000000.mp4" in captions(listing)


def test_compressed_tars_and_repeated_names_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w:gz") as tar:
        add(tar, "a.mp4", b"1")
    with tarfile.open(folder / "b.tar", "w") as tar:
        for _ in range(2):
            add(tar, "x.mp4", b"1")
            add(tar, "x.txt", b"x")
            add(tar, "y.mp4", b"1")
            add(tar, "y.txt", b"caf\xe9")
    listing = list_sources(folder)
    assert rejected(listing) == {"a.tar": "bad_tar", "b.tar/x.mp4": "repeated_key", "b.tar/y.mp4": "bad_caption"}


CONCEPTS = [
    {"name": "cats", "path": "c1", "balancing": 3.0, "loss_weight": 0.5, "text": {"prompt_source": "sample"}},
    {"name": "cats", "path": "c2", "type": "VALIDATION", "text": {"prompt_source": "filename"}},
    {
        "name": "dogs",
        "path": "c3",
        "include_subdirectories": True,
        "balancing": 10,
        "balancing_strategy": "SAMPLES",
        "text": {"prompt_source": "concept", "prompt_path": "dogs.txt"},
    },
    {"name": "off", "path": "gone", "enabled": False},
]
CONCEPT_FILES = {
    "c1/a.mp4": b"1",
    "c1/a.txt": "one\ntwo\n",
    "c1/sub/never.mp4": b"1",
    "c2/a sleeping cat.mp4": b"1",
    "c3/a.mp4": b"1",
    "c3/deep/b.mp4": b"1",
    "dogs.txt": "a dog\nthe dog\n",
}


def test_onetrainer_concepts(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {**CONCEPT_FILES, "concepts.json": json.dumps(CONCEPTS)})
    listing = list_sources(folder)
    assert captions(listing) == {
        "cats/a.mp4": ("one", "two"),
        "cats-2/a sleeping cat.mp4": ("a sleeping cat",),
        "dogs/a.mp4": ("a dog", "the dog"),
        "dogs/deep/b.mp4": ("a dog", "the dog"),
    }
    assert [(c.name, c.kind, c.repeats, c.loss_weight, c.num_clips) for c in listing.concepts] == [
        ("cats", "STANDARD", 3.0, 0.5, 1),
        ("cats-2", "VALIDATION", 1.0, 1.0, 1),
        ("dogs", "STANDARD", 5.0, 1.0, 2),
    ]
    write_clip(folder / "c1/a.mp4", 9)
    pack_clips(folder / "concepts.json", tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    assert read_json(locate(shards.tar_path(0), shards.index(0)[0], "json"))["concept"] == "cats"
    assert [c.repeats for c in shards.manifest.concepts] == [3.0, 1.0, 5.0]


def test_concepts_in_their_folders(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"x/a.mp4": b"1", "x/a.txt": "one", "x/concept.json": '{"name": "n", "balancing": 2}'})
    listing = list_sources(folder)
    assert captions(listing) == {"n/a.mp4": ("one",)}
    assert listing.concepts[0].repeats == 2


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        ({"name": "x"}, r"concepts\.json\[0\]: has no path"),
        ({"path": "gone"}, "no such folder"),
        ({"path": ".", "balancing": "many"}, "balancing is 'many'"),
        ({"path": ".", "text": {"prompt_source": "oracle"}}, "prompt_source is 'oracle'"),
        ({"path": ".", "text": {"prompt_source": "concept", "prompt_path": "gone.txt"}}, "prompts cannot be read"),
    ],
)
def test_wrong_concepts_are_one_line(tmp_path: Path, concept: dict[str, Any], message: str) -> None:
    folder = folder_of(tmp_path, {"a.mp4": b"1", "concepts.json": json.dumps([concept])})
    with pytest.raises(DataError, match=message):
        list_sources(folder)


def test_odd_names_are_packed_under_safe_keys(tmp_path: Path) -> None:
    names = ["a.b.c", "with space", "ünï✓", "..", "...mp4", "-rf", "x" * 120, "A.B.C"]
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in names:
        write_clip(folder / f"{name}.mp4", 3)
        (folder / f"{name}.txt").write_text(name)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "loop.txt").write_text("x")
    (folder / "round").symlink_to(folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).touch()
    result = pack_clips(folder, tmp_path / "out")
    hidden = {"..", "...mp4"}  # they begin with a dot
    assert result.num_clips == len(set(names) - hidden)
    assert result.rejects == {"bad_name": 1, "unreadable": 1}
    shards = open_shards(tmp_path / "out")
    found = {
        read_json(locate(shards.tar_path(0), r, "json"))["captions"][0]: r["key"].decode() for r in shards.index(0)
    }
    assert set(found) == set(names) - hidden
    assert len({key.lower() for key in found.values()}) == len(found)


def test_unknown_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--format lmdb is not known"):
        list_sources(tmp_path, source_format="lmdb")
    folder = folder_of(tmp_path, {"a.mp4": b"1", "a.txt": "x", "metadata.csv": "file,caption\na.mp4,y"})
    assert captions(list_sources(folder, source_format="sidecars")) == {"a.mp4": ("x",)}
