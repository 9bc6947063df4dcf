import os
from pathlib import Path

from wan_dist.data.probe import Reject
from wan_dist.data.source_files import file_source


def test_a_pipe_named_like_a_clip_is_rejected_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    found = file_source(tmp_path / "a.mp4", "a.mp4", ("caption",))
    assert isinstance(found, Reject)
    assert found.code == "unreadable"
