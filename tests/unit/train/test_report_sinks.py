"""Reports as files, TensorBoard points and a wandb run, which cannot end training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wan_dist.core.errors import ConfigError
from wan_dist.train.report_sinks import Lenient, MetricsFile, Sink, Wandb, flat, load_wandb
from wan_dist.train.throughput import Throughput, known_peak_tflops

ROW: dict[str, Any] = {
    "step": 7,
    "epoch": 0,
    "loss": 0.5,
    "mfu": None,
    "loss_by_sigma": {"0.0-0.1": None, "0.9-1.0": 0.25},
}


def test_tags_are_one_per_number() -> None:
    assert flat(ROW) == {"train/loss": 0.5, "loss_by_sigma/0.9-1.0": 0.25}


# What a run does on a disk of 1 MB that is full for a while; prints the log, and TensorBoard's points.
FULL_FOR_A_WHILE = """
import json, sys
from pathlib import Path
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wan_dist.cli.progress import log_as_rank
from wan_dist.io.run_folder import mark_failed, read_status, write_status
from wan_dist.train.report_sinks import Lenient, MetricsFile, TensorBoard

log_as_rank(0, "INFO")
run = Path(sys.argv[1])
sinks = [Lenient(MetricsFile(run)), Lenient(TensorBoard(run, 0))]
write_status(run, "training", step=0)
filler = run / "filler"
for step in range(30):
    if step == 10:
        with filler.open("wb", buffering=0) as out:
            while True:
                try:
                    out.write(bytes(4096))
                except OSError:
                    break
        mark_failed(run, "the first error", 1)
    if step == 20:
        filler.unlink()
    for sink in sinks:
        sink.write({"step": step, "loss": float(step), "padding": {str(i): 1.0 for i in range(40)}})
for sink in sinks:
    sink.close()
points = EventAccumulator(str(run)).Reload()
print([event.step for event in points.Scalars("train/loss")])
print([json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()])
print(len(list(run.glob("events.*"))), read_status(run)["state"])
"""


def test_a_disk_that_is_full_for_a_while_costs_reports_and_a_warning_of_each_sink(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=1m none "$1" || exit 77; shift; exec "$@"'
    python = [sys.executable, "-c", FULL_FOR_A_WHILE, str(tmp_path)]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh", str(tmp_path), *python]
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system of 1 MB can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("is lost to TensorBoard") == 1
    assert done.stderr.count("is lost to MetricsFile") == 1
    assert done.stderr.count("status.json could not be written") == 1
    points, rows, rest = done.stdout.splitlines()
    assert set(range(9)) | set(range(20, 30)) <= set(json.loads(points))
    assert {*range(10), *range(20, 30)} <= set(json.loads(rows)) < set(range(30))
    num_files, state = rest.split()
    assert int(num_files) <= 3
    assert state == "training"


def test_a_sink_that_fails_is_named_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gone").mkdir()
    broken = MetricsFile(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    sinks: list[Sink] = [Lenient(broken), Lenient(MetricsFile(tmp_path))]
    for row in (ROW, {**ROW, "step": 8}):
        for sink in sinks:
            sink.write(row)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0]) == ROW
    assert len(rows) == 2
    assert "the report of step 7 is lost to MetricsFile" in caplog.text
    assert len(caplog.records) == 1


def test_wandb_keeps_a_run_offline_and_continues_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for step in (1, 2):
        sink = Wandb(run_dir, "project", {"optim": {"lr": 1.0}})
        sink.write({**ROW, "step": step})
        sink.close()
    runs = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert runs
    assert len({run.name.rsplit("-", 1)[1] for run in runs}) == 1  # one run, named by its folder
    # The records hold the numbers under TensorBoard's tags.
    recorded = b"".join(file.read_bytes() for run in runs for file in run.glob("*.wandb"))
    assert b"train/loss" in recorded
    assert b"loss_by_sigma/0.9-1.0" in recorded


def test_a_missing_wandb_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'wan_dist\[wandb\]'"):
        load_wandb()


def test_mfu_is_of_the_stated_peak() -> None:
    config = {"num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40, "ffn_dim": 13824}
    use = Throughput({"transformer": config}, all_weights=True, checkpointing="block", peak_tflops=989.0)
    needed, done = use.flops("transformer", 2, 2 * 32_760)
    assert needed / 2e12 == pytest.approx(5035, abs=1)
    assert done / needed == pytest.approx(4 / 3)
    # 12.7 s for one sample on an H100 is 40 %.
    assert use.use(needed / 2, 12.73) == pytest.approx(0.4, abs=1e-3)
    assert known_peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert known_peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert known_peak_tflops("a card of tomorrow") is None
