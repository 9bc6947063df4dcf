"""The GPU benchmark is run by hand, on a machine that tests do not have: here it only must run at all."""

import json
import sys
from pathlib import Path

from tests.processes import run_program

PROGRAM = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu.py"


def test_gpu_benchmark_runs_quickly_and_writes_rows(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    done = run_program([sys.executable, PROGRAM, "--quick", "--out", out, "compact"])
    assert done.status == 0, done.stderr + done.stdout
    results = json.loads(out.read_text())
    assert not results["failed"]
    assert not results["left_out"]
    peer, ours, _ = results["rows"]
    assert peer["ratio"] == 1.0
    assert ours["contestant"].startswith("wan_dist")
    assert ours["seconds"] > 0
    assert f"| {ours['contestant']} | {1000 * ours['seconds']:.1f} |" in done.stdout
