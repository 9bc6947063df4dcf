"""Reports as files, TensorBoard points and a wandb run, which cannot end training."""

import json
from pathlib import Path
from typing import Any

import pytest

from wan_dist.core.errors import ConfigError
from wan_dist.train.report_sinks import MetricsFile, Sink, Wandb, flat, load_wandb, write_all
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


def test_a_sink_that_fails_is_named_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "gone").mkdir()
    broken = MetricsFile(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    sinks: list[Sink] = [broken, MetricsFile(tmp_path)]
    write_all(sinks, ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == ROW
    assert "metrics of step 7 could not be written (MetricsFile)" in caplog.text


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
