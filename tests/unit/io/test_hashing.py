import hashlib
import json
from pathlib import Path

import pytest

from wan_dist.core.hashing import sha256_of
from wan_dist.io.hashing import write_json_atomic, write_text_atomic


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 3])
def test_the_hash_is_that_of_all_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(i % 251 for i in range(1000)) * (size // 1000 + 1)
    path = tmp_path / "file"
    path.write_bytes(content[:size])
    assert sha256_of(path) == hashlib.sha256(content[:size]).hexdigest()


def test_a_write_replaces_the_text_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_text_atomic(path, "old, and longer than the new one")
    write_text_atomic(path, "neu ü")
    assert path.read_text(encoding="utf-8") == "neu ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json_atomic(path, {"step": 1})
    with pytest.raises(TypeError):
        write_json_atomic(path, {"step": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "half \ud800")
    assert json.loads(path.read_text()) == {"step": 1}
