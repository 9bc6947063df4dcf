import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from wan_dist.core.errors import CheckpointError
from wan_dist.core.hashing import sha256_of
from wan_dist.io.checkpoint import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    POINTER_NAME,
    folder_name,
    newest_whole,
    prune,
    read_manifest,
    set_aside_newer,
    step_folders,
)
from wan_dist.io.component_weights import find_checkpoint
from wan_dist.io.hashing import write_json_atomic
from wan_dist.io.trust import sign


def write_checkpoint(root: Path, step: int, *, world_size: int = 2) -> Path:
    """Write a checkpoint folder as `save` leaves it, with small files."""
    folder = root / folder_name(step)
    folder.mkdir(parents=True)
    for rank in range(world_size):
        (folder / f"rank-{rank}.pt").write_bytes(bytes([step % 256, rank]) * 100)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in folder.iterdir()}
    manifest = {"version": MANIFEST_VERSION, "step": step, "world_size": world_size, "state": {"epoch": 0}}
    manifest |= {"zero_stage": 3, "components": ["transformer"]}
    write_json_atomic(folder / MANIFEST_NAME, sign({**manifest, "files": files}))
    (root / POINTER_NAME).write_text(folder.name + "\n")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run with whole checkpoints after steps 10 and 20."""
    root = tmp_path / "run" / "checkpoints"
    write_checkpoint(root, 10)
    write_checkpoint(root, 20)
    return root


def flip_bit(folder: Path) -> str:
    path = folder / "rank-1.pt"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    return "rank-1.pt: content changed"


def truncate(folder: Path) -> str:
    with (folder / "rank-0.pt").open("r+b") as stream:
        stream.truncate(199)
    return "rank-0.pt: 199 bytes, 200 were written"


def lose_file(folder: Path) -> str:
    (folder / "rank-0.pt").unlink()
    return "rank-0.pt: missing"


def lose_manifest(folder: Path) -> str:
    (folder / MANIFEST_NAME).unlink()
    return "no manifest.json; the checkpoint was never completed"


def tear_manifest(folder: Path) -> str:
    text = (folder / MANIFEST_NAME).read_text()
    (folder / MANIFEST_NAME).write_text(text[: len(text) // 2])
    return "manifest.json: damaged"


def other_version(folder: Path) -> str:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    write_json_atomic(folder / MANIFEST_NAME, {**manifest, "version": 99})
    return "version 99, this program reads 2"


DAMAGES = [flip_bit, truncate, lose_file, lose_manifest, tear_manifest, other_version]


def newest_step(root: Path) -> int:
    checkpoint = newest_whole(root)
    assert checkpoint is not None
    return checkpoint.step


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over(
    root: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    named = damage(root / folder_name(20))
    assert newest_step(root) == 10
    assert named in caplog.text
    assert folder_name(10) not in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_export_of_a_damaged_folder_is_refused_and_of_its_run_takes_the_whole_one(
    root: Path, damage: Callable[[Path], str]
) -> None:
    damage(root / folder_name(20))
    with pytest.raises(CheckpointError):
        find_checkpoint(root / folder_name(20))
    assert find_checkpoint(root.parent).step == 10


def test_nothing_whole_is_said(root: Path) -> None:
    for step in (10, 20):
        flip_bit(root / folder_name(step))
    assert newest_whole(root) is None
    with pytest.raises(CheckpointError, match="2 damaged ones"):
        find_checkpoint(root.parent)


def test_the_pointer_is_only_a_hint(root: Path) -> None:
    (root / POINTER_NAME).write_text("step-99999999\n")
    assert newest_step(root) == 20
    (root / POINTER_NAME).unlink()
    assert newest_step(root) == 20


def test_other_names_are_no_checkpoints(root: Path) -> None:
    for name in (".tmp-step-00000030", "step-30", "step-000000030", "damaged-step-00000030-1"):
        (root / name).mkdir()
    (root / "step-00000040").touch()
    assert [folder.name for folder in step_folders(root)] == [folder_name(20), folder_name(10)]
    assert step_folders(root / "absent") == []


def test_state_comes_back(root: Path) -> None:
    checkpoint = read_manifest(root / folder_name(20))
    assert (checkpoint.step, checkpoint.world_size, checkpoint.state) == (20, 2, {"epoch": 0})
    assert checkpoint.num_bytes == 400


def test_prune_keeps_the_newest_and_clears_interrupted_saves(root: Path) -> None:
    for step in (30, 40):
        write_checkpoint(root, step)
    (root / ".tmp-step-00000050").mkdir()
    prune(root, 2)
    assert [folder.name for folder in step_folders(root)] == [folder_name(40), folder_name(30)]
    assert not list(root.glob(".tmp-*"))
    prune(root, 5)
    assert len(step_folders(root)) == 2


def test_a_damaged_future_never_counts_as_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_bit(root / folder_name(20))
    set_aside_newer(root, newest_step(root))
    write_checkpoint(root, 15)
    prune(root, 1)
    assert newest_step(root) == 15
    assert len(list(root.glob("damaged-step-00000020-*"))) == 1
    assert any(record.levelno == logging.WARNING and "damaged" in record.message for record in caplog.records)
