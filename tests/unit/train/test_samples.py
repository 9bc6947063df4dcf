"""Videos drawn in training as files, which cannot end training."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wan_dist.train.watching import _images

# On a small disk: the first video, or the strip beside it, does not fit; once a filler is gone the second does.
FULL = """
import sys
from pathlib import Path
import numpy as np
import torch
from wan_dist.train.samples import SampleJob, keep_video

noise = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
frames = np.repeat(noise[:1], 9, axis=0) // 8 * 8
filler = Path(sys.argv[1]) / "filler"
filler.write_bytes(bytes(int(sys.argv[2])))
for number in range(2):
    job = SampleJob(number, "a fox", torch.zeros(0), None, 0)
    keep_video(Path(sys.argv[1]) / "step-00000001", job, frames, 8.0)
    print(sorted(path.name for path in Path(sys.argv[1]).rglob("*.*")))
    filler.unlink(missing_ok=True)
"""


@pytest.mark.parametrize("taken_bytes", [258_048, 249_856])
def test_a_full_disk_costs_the_video_and_no_half_of_it_stays(tmp_path: Path, taken_bytes: int) -> None:
    mount = 'mount -t tmpfs -o size=256k none "$1" || exit 77; shift; exec "$@"'
    command: list[object] = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", tmp_path]
    command += [sys.executable, "-c", FULL, tmp_path, taken_bytes]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system of 256 KB can be made here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "000.mp4 is lost" in done.stderr
    full, freed = done.stdout.splitlines()
    assert full == "[]"
    assert freed == "['001.mp4', '001.png', '001.txt']"


def test_a_given_first_frame_is_turned_as_its_photo_says(tmp_path: Path) -> None:
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: viewers turn it clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "photo.png", exif=exif)
    samples = SimpleNamespace(images=[str(tmp_path / "photo.png")], size=(64, 32))
    cfg: Any = SimpleNamespace(samples=samples)
    (image,) = _images(cfg)
    assert image is not None
    assert np.array_equal(np.asarray(image), upright)
