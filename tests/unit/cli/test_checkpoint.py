"""`wan-dist checkpoint`, and what docs/checkpoints.md says of commands and keys."""

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from tests.checkpoints import write_run
from wan_dist.cli.main import app
from wan_dist.config.schema_run import CheckpointConfig
from wan_dist.core.errors import CheckpointError
from wan_dist.io import trust
from wan_dist.io.checkpoint import commit
from wan_dist.io.run_folder import claim_run

DOCS = (Path(__file__).parents[3] / "docs" / "checkpoints.md").read_text()


def command(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 7 and 8."""
    weights = {"transformer": {"proj.weight": torch.arange(6.0).reshape(2, 3), "proj.bias": torch.ones(3)}}
    run = write_run(tmp_path / "run", weights, method={"kind": "full"}, variant="ti2v-5B", model_path=tmp_path)
    newer = write_run(
        tmp_path / "newer", weights, method={"kind": "full"}, variant="ti2v-5B", model_path=tmp_path, step=8
    )
    (newer / "checkpoints" / "step-00000008").rename(run / "checkpoints" / "step-00000008")
    return run


def test_list_shows_the_newest_first_and_reads_no_file(run: Path) -> None:
    status, out = command("list", run, "--json")
    assert status == 0
    newest, older = json.loads(out)
    assert (newest["step"], older["step"]) == (8, 7)
    assert (newest["ranks"], newest["components"], newest["method"]) == (2, ["transformer"], "full")
    assert newest["own"]
    assert not newest["verified"]
    text = command("list", run)[1].splitlines()
    assert text[0].split()[:3] == ["step", "saved", "GB"]
    assert "complete" in text[1]


def test_the_time_of_the_save_survives_a_copy_and_old_manifests_are_read(tmp_path: Path) -> None:
    temporary = tmp_path / "checkpoints" / ".tmp-step-00000003"
    temporary.mkdir(parents=True)
    manifest = {"version": 2, "step": 3, "world_size": 1, "zero_stage": 3, "components": [], "state": {}, "files": {}}
    before = time.time()
    folder = commit(temporary, manifest)
    os.utime(folder, (9.0, 9.0))  # as `cp -r` gives it another
    assert before <= json.loads(command("list", tmp_path, "--json")[1])[0]["saved"] <= time.time()
    (folder / "manifest.json").write_text(json.dumps(trust.sign(manifest)))
    os.utime(folder, (9.0, 9.0))
    (row,) = json.loads(command("list", tmp_path, "--json")[1])
    assert (row["saved"], row["problems"]) == (9.0, [])


def test_verify_names_the_damaged_file_and_fails(run: Path) -> None:
    status, out = command("verify", run)
    assert status == 0
    assert out.count("verified") == 2
    path = next((run / "checkpoints" / "step-00000008" / "transformer").glob("*_rank_1_*optim_states.pt"))
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    status, out = command("verify", run)
    assert status == 1
    assert "DAMAGED" in out.splitlines()[1]
    assert f"{path}: content changed" in out


def test_prune_says_what_it_would_delete_and_deletes_it(run: Path) -> None:
    assert command("prune", run, "--dry-run", "--json") == (0, '["step-00000007"]\n')
    assert (run / "checkpoints" / "step-00000007").is_dir()
    assert command("prune", run, "--keep-every", 7, "--dry-run") == (0, "nothing to delete\n")
    assert command("prune", run) == (0, "step-00000007\n")
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000008"]


def test_prune_deletes_nothing_while_the_newest_is_damaged_or_the_run_trains(run: Path) -> None:
    rng = next((run / "checkpoints" / "step-00000008").rglob("*.pt"))
    rng.write_bytes(bytes(rng.stat().st_size))
    with pytest.raises(CheckpointError, match="nothing was deleted"):
        command("prune", run)
    with claim_run(run), pytest.raises(CheckpointError, match="is training there"):
        command("prune", run)
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no run folder"):
        command("list", tmp_path)


def parse(line: str) -> None:
    parsed: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while hasattr(parsed, "commands"):
        parsed = parsed.commands[words.pop(0)]
    parsed.make_context("wan-dist", words)


@pytest.mark.parametrize("line", re.findall(r"^wan-dist checkpoint .+$", DOCS, re.M))
def test_a_command_of_the_docs_is_understood(line: str) -> None:
    parse(line)


def test_keys_of_the_docs_have_the_defaults_that_are_said() -> None:
    config = CheckpointConfig()
    said = re.findall(r"`(?:checkpoint\.)?(save_every|async|keep_last|keep_every|grace_s): ([^`]+)`", DOCS)
    assert {key for key, _ in said} >= {"save_every", "async", "keep_last", "keep_every", "grace_s"}
    for key, value in said:
        assert getattr(config, key) == yaml.safe_load(value), key
