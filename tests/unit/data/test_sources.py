"""Clips and captions are found, and whatever does not match is reported."""

import json
from pathlib import Path

import pytest

from wan_dist.core.errors import DataError
from wan_dist.data.sources import list_sources


def folder_of(tmp_path: Path, files: dict[str, str | bytes]) -> Path:
    folder = tmp_path / "clips"
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def rejected(folder: Path, captions: Path | None = None) -> dict[str, str]:
    return {r.path: r.code for r in list_sources(folder, captions).rejects}


def test_sidecars_give_captions(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {
            "b.mp4": b"1",
            "b.txt": "\ufeffa cat \n",
            "sub/a.mkv": b"22",
            "sub/a.json": json.dumps({"prompt": ["one", "two"], "other": 1}),
            "readme.md": "no clip",
            ".hidden.mp4": b"",
        },
    )
    listing = list_sources(folder)
    assert [(s.path, s.num_bytes, s.captions) for s in listing.sources] == [
        ("b.mp4", 1, ("a cat",)),
        ("sub/a.mkv", 2, ("one", "two")),
    ]
    assert not listing.rejects


def test_bad_sidecars_are_reported(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {
            **{f"{n}.mp4": b"1" for n in ("none", "empty", "latin", "nul", "broken", "list", "deep")},
            "empty.txt": " \n",
            "latin.txt": "caf\xe9".encode("latin-1"),
            "nul.txt": "a\0b",
            "broken.json": "{",
            "list.json": "[1]",
            "deep.json": "[" * 100_000,
            "clip.mpg": b"1",
            "clip.txt": "of a clip of another kind",
            "lost.txt": "of a clip that is not there",
            "README.txt": "about all clips",
            "scan.tiff": b"1",
        },
    )
    assert rejected(folder) == {
        "none.mp4": "no_caption",
        **{f"{n}.mp4": "bad_caption" for n in ("empty", "latin", "nul", "broken", "list", "deep")},
        "clip.mpg": "unknown_container",
        "scan.tiff": "unknown_container",
        "lost.txt": "lone_caption",
    }


def test_caption_file_rows(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, dict.fromkeys(("a.mp4", "b.mp4", "sub/c.mp4", "d.mp4", "Case.mp4"), b"1"))
    rows = [
        {"file": "a.mp4", "caption": "one"},
        {"video": "./a.mp4", "text": ["two", "three"]},
        {"path": str(folder / "b.mp4"), "prompt": "absolute"},
        {"file_name": "sub/c.mp4", "caption": "line\u2028separator"},
        {"file": "case.mp4", "caption": "x"},
        {"file": "../outside.mp4", "caption": "x"},
        {"file": "d.mp4", "caption": ""},
        {"caption": "no file"},
        {"file": "d.mp4", "caption": 5},
    ]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\n".join([json.dumps(r, ensure_ascii=False) for r in rows] + ["not json", ""]))
    listing = list_sources(folder, captions)
    assert {s.path: s.captions for s in listing.sources} == {
        "a.mp4": ("one", "two", "three"),
        "b.mp4": ("absolute",),
        "sub/c.mp4": ("line\u2028separator",),
    }
    assert rejected(folder, captions) == {
        "captions.jsonl:5": "row_without_file",
        "captions.jsonl:6": "row_without_file",
        "captions.jsonl:7": "bad_row",
        "captions.jsonl:8": "bad_row",
        "captions.jsonl:9": "bad_row",
        "captions.jsonl:10": "bad_row",
        "Case.mp4": "no_caption",
        "d.mp4": "no_caption",
    }
    assert any("Case.mp4" in r.hint for r in listing.rejects if r.path == "captions.jsonl:5")


def test_nothing_to_list_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        list_sources(tmp_path / "gone")
    with pytest.raises(DataError, match=r"no clips; clips are \.mp4"):
        list_sources(tmp_path)
    folder = folder_of(tmp_path, {"a.mp4": b""})
    with pytest.raises(DataError, match="--captions"):
        list_sources(folder, tmp_path / "gone.jsonl")
