"""Shards are pickles: only what this user's runs wrote is loaded."""

from pathlib import Path

import pytest

from wan_dist.core.errors import CheckpointError
from wan_dist.io.trust import is_intact, is_own, require_own, sign

MANIFEST = {"version": 2, "step": 3, "files": {"a": {"bytes": 1, "sha256": "x"}}}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WAN_DIST_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def test_a_signed_manifest_is_ones_own_and_its_key_is_private(state: Path) -> None:
    signed = sign(MANIFEST)
    assert is_intact(signed)
    assert is_own(signed)
    key = state / "checkpoint.key"
    assert key.stat().st_mode & 0o077 == 0
    assert key.read_bytes() != b""
    assert sign(MANIFEST) == signed  # the key stays


def test_a_changed_manifest_is_neither_intact_nor_ones_own() -> None:
    forged = {**sign(MANIFEST), "step": 4}
    assert not is_intact(forged)
    assert not is_own(forged)


def test_a_stranger_who_signs_with_a_key_of_their_own_is_refused(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(MANIFEST)
    monkeypatch.setenv("WAN_DIST_STATE_DIR", str(tmp_path / "stranger"))
    theirs = sign(MANIFEST)
    monkeypatch.setenv("WAN_DIST_STATE_DIR", str(state))
    assert is_intact(theirs)
    with pytest.raises(CheckpointError, match=r"pickles, which run code.*give checkpoint\.trust=true"):
        require_own(tmp_path, theirs, trusted=False, option="checkpoint.trust=true")
    require_own(tmp_path, theirs, trusted=True, option="checkpoint.trust=true")


def test_without_a_key_nothing_is_ones_own(state: Path) -> None:
    signed = sign(MANIFEST)
    (state / "checkpoint.key").unlink()
    assert not is_own(signed)
    assert not is_own({**MANIFEST, "signature": None})


def test_one_module_loads_pickles() -> None:
    package = Path(__file__).parents[3] / "wan_dist"
    loading = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "torch.load(" in path.read_text() or "pickle.load" in path.read_text()
    ]
    assert loading == ["io/pickles.py"]
