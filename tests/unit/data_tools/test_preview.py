"""What preview shows, encoded, is what the trainer's own batches hold, every draw at random."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from data_tools import preview
from data_tools.app import app
from tests.clips import write_clip
from wan_dist.config.load import load_config
from wan_dist.data.encode import load_encoders
from wan_dist.data.pack import pack_clips
from wan_dist.models.wan.build import make_tiny_pipeline
from wan_dist.parallel.dist import Ranks
from wan_dist.train.build_data import open_batches

KEYS = [str(number) for number in range(4)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    (folder / "clips").mkdir()
    for key in KEYS:
        write_clip(folder / "clips" / f"{key}.mp4", 24, fps=24, size=(160, 48))
        (folder / "clips" / f"{key}.txt").write_text(f"caption {key}")
    pack_clips(folder / "clips", folder / "shards")
    make_tiny_pipeline("ti2v-5B", folder / "model")
    data = {"shards": str(folder / "shards"), "sizes": [[64, 32]], "num_frames": [5], "fps": 16.0}
    values = {
        "version": 1,
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "model"), "variant": "ti2v-5B"},
        "data": {**data, "crop": "random", "frame_choice": "random", "num_workers": 0},
        "train": {"num_steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "seed": 11},
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Ranks]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    torch.distributed.destroy_process_group()


def previewed(config: Path, epoch: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, NDArray[np.uint8]]:
    """Return the frames that the command writes for each clip, before a video codec changes them."""
    written: dict[str, NDArray[np.uint8]] = {}
    monkeypatch.setattr(preview, "write_mp4", lambda path, frames, fps: written.update({path.stem: frames}))
    command = ["preview", str(config.parent / "shards"), "--config", str(config), "--keys", ",".join(KEYS)]
    result = CliRunner().invoke(app, [*command, "--out", str(out / "x.mp4"), "--epoch", str(epoch)])
    assert result.exit_code == 0, result.output
    return {name.removeprefix("x-"): frames for name, frames in written.items()}


def test_preview_shows_what_the_trainers_batches_hold(
    config: Path, one_rank: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, _ = open_batches(load_config(config), one_rank, torch.float32)
    encoders = load_encoders(config.parent / "model", torch.device("cpu"), torch.float32)
    trained: list[tuple[str, torch.Tensor]] = []
    for _, micro_batches in batches.steps(0, 0):
        trained += [(batch.keys[0], batch.latents[0]) for batch in micro_batches]
        if len(trained) >= 2 * len(KEYS):
            break
    batches.close()
    shown = [previewed(config, epoch, tmp_path, monkeypatch) for epoch in range(2)]
    for number, (key, latents) in enumerate(trained[: 2 * len(KEYS)]):
        frames = shown[number // len(KEYS)][key]
        assert torch.equal(encoders.encode_video(frames[None])[0], latents), (number, key)
    # The draws differ between the epochs, so that equality says something.
    assert any(not np.array_equal(shown[0][key], shown[1][key]) for key in KEYS)
