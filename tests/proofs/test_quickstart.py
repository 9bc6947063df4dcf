"""`wan-dist quickstart` from nothing to videos that show what their captions say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest

pytestmark = pytest.mark.proof


def test_quickstart_videos_show_what_their_captions_say(tmp_path: Path):
    out = tmp_path / "quickstart"
    done = subprocess.run(
        [sys.executable, "-m", "wan_dist", "quickstart", "--out", str(out)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((out / "report.json").read_text())
    assert report["num_prompts"] == 8
    assert report["num_colour_matches"] >= 7, report
    assert report["num_direction_matches"] >= 6, report
    container: Any
    for row in report["videos"]:
        with av.open(row["video"]) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            assert len(list(container.decode(video=0))) == 9
    assert len(list((out / "clips").glob("*.mp4"))) >= 24
    assert list((out / "run").glob("events.out.tfevents.*"))
    assert (out / "samples.png").is_file()
    settings = json.loads((out / "run" / "ds_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert settings["bf16"]["enabled"]
    for place in ("shards", "run", "export", "samples", "tensorboard --logdir"):
        assert place in done.stdout
