"""Footage that nobody here generated: pack it and train on it with the shipped config."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CLIPS = REPOSITORY.parent / "shared" / "clips"


@pytest.mark.proof
@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside the checkout")
def test_ten_steps_on_real_clips(tmp_path: Path):
    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    run("data_tools", "pack", str(CLIPS), "shards/tiny-4clips", "--captions", str(CLIPS / "captions.jsonl"))
    run("wan_dist", "models", "make-tiny", "--variant", "ti2v-5B", "models/tiny-ti2v-5b")
    log = run("wan_dist", "launch", str(REPOSITORY / "configs/train/tiny-4clips.yaml"), "--num-gpus", "2")
    assert "4 of 4 clips used" in log
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny-4clips/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    run("wan_dist", "consolidate", "runs/tiny-4clips", "export")
    assert (tmp_path / "export" / "model_index.json").is_file()
