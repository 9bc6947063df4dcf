import json
import subprocess
import sys
from pathlib import Path

import pytest

from wan_dist.cli.main import app
from wan_dist.cli.run import run_app
from wan_dist.config.resources import configs_dir

TI2V = str(configs_dir() / "train" / "ti2v-5b.yaml")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["wan-dist", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_app(app, "wan-dist")
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_show_prints_a_config_that_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run(monkeypatch, "config", "show", TI2V, "train.num_steps=10") == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert run(monkeypatch, "config", "show", str(resolved), "--json") == 0
    assert json.loads(capsys.readouterr().out)["train"]["num_steps"] == 10


def test_validate_says_valid_or_names_each_problem_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "config", "validate", TI2V) == 0
    assert capsys.readouterr().out == f"{TI2V}: valid\n"
    assert run(monkeypatch, "config", "validate", TI2V, "data.num_frames=[80]", "data.fpss=3") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "wan-dist: override data.fpss: data.fpss is not a known key; did you mean data.fps?",
        "wan-dist: override data.num_frames: data.num_frames = 80 is not 4n+1; use 77 or 81.",
    ]


def test_validate_paths_names_missing_folders_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "config", "validate", TI2V, "--paths") == 2
    assert "model.path = models/Wan2.2-TI2V-5B-Diffusers: there is no such folder" in capsys.readouterr().err


def test_schema_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert run(monkeypatch, "config", "schema") == 0
    assert json.loads(capsys.readouterr().out)["additionalProperties"] is False


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--local_rank=1", "--help"], ["config", "--local-rank=1", "show", "--help"]]
)
def test_help_shows_a_command_and_imports_nothing_heavy(arguments: list[str]):
    code = (
        "import sys\n"
        "from wan_dist.__main__ import main\n"
        f"sys.argv = ['wan-dist', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'deepspeed', 'transformers', 'diffusers', 'numpy', 'av'} & set(sys.modules)\n"
        "    sys.exit(f'imported {sorted(heavy)}' if heavy else stop.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example: wan-dist config" in done.stdout
