"""The `wan-data` commands as a user types them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from data_tools.__main__ import main
from tests.clips import write_clip

ROOT = Path(__file__).parents[3]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def wan_data_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs a command as the program does, in this process: starting one takes a second or more."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["wan-data", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return Done(int(ended.value.code or 0), printed.out, printed.err)

    return run


def wan_data(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_tools", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_clip(folder / f"{number}.mp4", 9 + number, fps=16)
    (folder / "bad.mp4").write_bytes(b"")
    rows = [{"video": f"{n}.mp4", "text": f"caption {n}"} for n in (0, 1, "bad", "lost")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_pack_then_inspect(clips: Path, tmp_path: Path, wan_data_here: Callable[..., Done]) -> None:
    out = tmp_path / "shards"
    done = wan_data("pack", clips, out, "--captions", clips / "captions.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"{out}: 2 clips in 1 shard" in done.stdout
    assert "rejected: 1 empty_file, 1 no_caption, 1 row_without_file" in done.stdout
    assert "3/3 clips" in done.stderr
    assert "clips/s" in done.stderr
    shown = wan_data_here("inspect", out)
    assert shown.returncode == 0
    assert "clips 2, shards 1" in shown.stdout
    assert "160x96" in shown.stdout
    found = json.loads(wan_data_here("inspect", out, "--json").stdout)
    assert found["clips"] == 2
    assert found["kinds"] == [
        {"width": 160, "height": 96, "fps": 16.0, "clips": 2, "num_frames": [9, 10], "duration_s": [0.562, 0.625]}
    ]
    again = json.loads(wan_data_here("pack", clips, out, "--captions", clips / "captions.jsonl", "--json").stdout)
    assert (again["num_clips"], again["resumed_shards"]) == (2, 1)


def test_errors_are_one_line_with_status_1(clips: Path, tmp_path: Path, wan_data_here: Callable[..., Done]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (("pack", tmp_path / "empty", tmp_path / "out"), "no clips"),
        (("pack", clips, tmp_path / "out"), "every clip was rejected (4 no_caption)"),
        (("pack", tmp_path / "gone", tmp_path / "out"), "no such folder"),
        (("inspect", tmp_path / "empty"), "no manifest.json"),
    ]:
        done = wan_data_here(*arguments)
        assert done.returncode == 1
        assert done.stdout == ""
        last = done.stderr.splitlines()[-1]
        assert last.startswith("wan-data: ")
        assert message in last
        assert "Traceback" not in done.stderr


def test_wrong_usage_has_status_2(wan_data_here: Callable[..., Done]) -> None:
    for arguments in (
        ("pack",),
        ("inspect", "x", "--nope"),
        ("pakc",),
        ("pack", "a", "b", "--workers", "0"),
        ("pack", "a", "a"),
    ):
        done = wan_data_here(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("wan-data: ")


def test_help_of_every_verb_has_an_example(wan_data_here: Callable[..., Done]) -> None:
    for verb in ("pack", "cache", "index", "inspect", "preview", "verify"):
        done = wan_data_here(verb, "--help")
        assert done.returncode == 0
        assert f"Example: wan-data {verb}" in done.stdout
