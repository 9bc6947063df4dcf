import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wan_dist.core.errors import CheckpointError
from wan_dist.io.run_folder import claim_run, describe_run, keep_metrics_before, mark_failed, read_status, write_status


def gone_pid() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_is_described_by_three_files(tmp_path: Path) -> None:
    describe_run(tmp_path / "run", config_yaml="version: 1\n", ds_config={"a": 1}, world_size=2)
    assert (tmp_path / "run" / "config.yaml").read_text() == "version: 1\n"
    assert json.loads((tmp_path / "run" / "ds_config.json").read_text()) == {"a": 1}
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["versions"]["torch"]


def test_no_secret_of_the_environment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "do-not-write-me")
    describe_run(tmp_path, config_yaml="", ds_config={}, world_size=1)
    assert not any("do-not-write-me" in path.read_text() for path in tmp_path.iterdir())


def test_status_is_replaced(tmp_path: Path) -> None:
    write_status(tmp_path, "training", step=3)
    write_status(tmp_path, "stopped", step=4)
    status = read_status(tmp_path)
    assert (status["state"], status["step"], status["pid"]) == ("stopped", 4, os.getpid())


def test_a_folder_without_status_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a run folder"):
        read_status(tmp_path)
    (tmp_path / "status.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_status(tmp_path)


def test_a_run_whose_process_is_gone_is_marked_failed(tmp_path: Path) -> None:
    write_status(tmp_path, "training", step=3)
    status = read_status(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({**status, "pid": gone_pid()}))
    mark_failed(tmp_path, "a rank was killed", 1)
    marked = read_status(tmp_path)
    assert (marked["state"], marked["step"], marked["error"]) == ("failed", 3, "a rank was killed")
    assert marked["exit_code"] == 1


def test_who_knows_better_replaces_what_a_rank_said_of_this_job_only(tmp_path: Path) -> None:
    write_status(tmp_path, "failed", step=3, error="connection closed by peer")
    said = read_status(tmp_path)["time"]
    mark_failed(tmp_path, "later guess", 1)
    mark_failed(tmp_path, "rank 1 was ended by SIGKILL", 1, known_better_since=said + 1)
    assert read_status(tmp_path)["error"] == "connection closed by peer"
    mark_failed(tmp_path, "rank 1 was ended by SIGKILL", 1, known_better_since=said - 1)
    assert read_status(tmp_path)["error"] == "rank 1 was ended by SIGKILL"


def test_a_status_that_cannot_be_written_is_one_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_status(tmp_path, "training", step=3)
    (tmp_path / ".status.json.tmp").mkdir()  # where the new text would be written
    mark_failed(tmp_path, "the first error", 1)
    assert read_status(tmp_path)["state"] == "training"
    (record,) = caplog.records
    assert "status.json could not be written" in record.message


def test_what_ended_or_runs_elsewhere_is_not_marked(tmp_path: Path) -> None:
    mark_failed(tmp_path, "no run here", 1)
    assert not (tmp_path / "status.json").exists()
    write_status(tmp_path, "finished", step=3)
    mark_failed(tmp_path, "too late", 1)
    assert read_status(tmp_path)["state"] == "finished"
    write_status(tmp_path, "training", step=3)
    status = read_status(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({**status, "pid": os.getppid()}))
    mark_failed(tmp_path, "of another job", 1)
    assert read_status(tmp_path)["state"] == "training"


def test_metrics_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": ')
    keep_metrics_before(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_metrics_before(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_run_folder_has_one_process_at_a_time(tmp_path: Path) -> None:
    claim = claim_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} is training there"):
        claim_run(tmp_path / "run")
    claim.close()
    claim_run(tmp_path / "run").close()
