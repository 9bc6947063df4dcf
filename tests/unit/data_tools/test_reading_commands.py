"""`wan-data verify | index | inspect --plan | preview` as a user types them."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from data_tools.app import app
from tests.clips import write_clip
from wan_dist.core.errors import WanDistError
from wan_dist.data.pack import pack_clips


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def wan_data(*arguments: str | Path) -> Done:
    """Run a command in this process: starting one that imports torch takes seconds."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    error = result.exception
    if isinstance(error, WanDistError):
        return Done(error.exit_code, result.stdout, str(error))
    assert error is None or isinstance(error, SystemExit), error
    return Done(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading")
    (folder / "clips").mkdir()
    for number in range(3):
        write_clip(folder / "clips" / f"{number}.mp4", 9 if number else 4, fps=16, size=(128, 64))
        (folder / "clips" / f"{number}.txt").write_text(f"caption {number}")
    pack_clips(folder / "clips", folder / "shards")
    config = {
        "version": 1,
        "run_dir": "run",
        "model": {"path": "nowhere", "variant": "ti2v-5B"},
        "data": {"shards": "elsewhere", "sizes": [[64, 32]], "num_frames": [5], "fps": 16.0, "caption_dropout": 0.0},
        "train": {"num_steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_plan_says_what_training_will_do(folder: Path) -> None:
    plan = json.loads(wan_data("inspect", folder / "shards", "--plan", folder / "train.yaml", "--json").stdout)
    assert plan["buckets"] == [{"width": 64, "height": 32, "num_frames": 5, "clips": 2, "samples_per_epoch": 2.0}]
    assert (plan["drops"], plan["used"], plan["clips"]) == ({"too_short": 1}, 2, 3)
    assert plan["steps_per_epoch"] == [0, 1, 0, 1]
    assert plan["world_sizes"] == [1, 2]
    text = wan_data("inspect", folder / "shards", "--plan", folder / "train.yaml").stdout
    assert "fewer than a batch" in text
    assert "global batch 4: runs on 1, 2 ranks" in text


def test_any_tar_and_any_sample_can_be_looked_at(folder: Path) -> None:
    tar = folder / "shards" / "data-000000.tar"
    found = json.loads(wan_data("inspect", tar, "--json").stdout)
    assert (found["samples"], found["members"]["mp4"]["count"], found["first_keys"]) == (3, 3, ["0", "1", "2"])
    for where in (tar, folder / "shards"):
        sample = json.loads(wan_data("inspect", where, "--key", "1", "--json").stdout)
        assert (sample["txt"], sample["mp4"]["num_frames"]) == ("caption 1", 9)
    assert "no sample 9" in wan_data("inspect", tar, "--key", "9").stderr


def test_preview_shows_the_trainers_frames(folder: Path, tmp_path: Path) -> None:
    config = ("--config", folder / "train.yaml")
    done = wan_data("preview", folder / "shards", *config, "--keys", "1,2", "--out", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert np.asarray(Image.open(tmp_path / "x.png")).std() > 20
    done = wan_data("preview", folder / "shards", *config, "--keys", "1", "--out", tmp_path / "x.mp4")
    assert "1: 64x32, 5 frames at 16 fps: caption 1" in done.stdout
    with av.open(str(tmp_path / "x.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5
    missing = wan_data("preview", folder / "shards", *config, "--keys", "0", "--out", tmp_path / "x.png")
    assert "sample 0 is in no bucket" in missing.stderr.splitlines()[-1]
    wrong = wan_data("preview", folder / "shards", *config, "--keys", "1", "--out", tmp_path / "x.gif")
    assert (wrong.returncode, ".png or .mp4" in wrong.stderr) == (2, True)


def test_verify_has_status_1_for_damage(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "shards", tmp_path / "shards")
    assert wan_data("verify", tmp_path / "shards").returncode == 0
    tar = tmp_path / "shards" / "data-000000.tar"
    content = bytearray(tar.read_bytes())
    content[content.find(b"mdat") + 40] ^= 1
    tar.write_bytes(content)
    done = wan_data("verify", tmp_path / "shards")
    assert done.returncode == 1
    assert f"{tar}: sample 0: media: its checksum differs" in done.stdout
    assert [d["sample"] for d in json.loads(wan_data("verify", tmp_path / "shards", "--json").stdout)["damaged"]] == [
        "0"
    ]
    family = tmp_path / "shards" / "text-0123456789ab"
    family.mkdir()
    (family / "manifest.json").write_text("{")
    tar.write_bytes(content[:1000])
    done = wan_data("verify", tmp_path / "shards")
    assert done.returncode == 1
    assert f"{tar}: has 1000 bytes instead of {len(content)}\n" in done.stdout
    assert f"{family / 'manifest.json'}: " in done.stdout


def test_foreign_tars_are_indexed(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "shards" / "data-000000.tar", tmp_path / "00000.tar")
    assert "run `wan-data index`" in wan_data("inspect", tmp_path).stderr
    assert "3 clips in 1 tar; left out: none" in wan_data("index", tmp_path).stdout
    assert "clips 3" in wan_data("inspect", tmp_path).stdout
