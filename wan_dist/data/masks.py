"""Masks beside clips: which are packed, and how they are checked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from wan_dist.data.prepare import Piece
from wan_dist.data.probe import ClipInfo, Reject

MASK_SUFFIXES: Final = (".mask.png", ".mask.mp4", ".mask.mkv", "-masklabel.png")
"""What the name of a clip's mask ends with after the clip's own; the last is OneTrainer's."""

STILL_MAGIC: Final = (b"\x89PNG", b"\xff\xd8\xff")
"""First bytes of a mask that is one image for all frames."""

_MAX_ASPECT_ERROR: Final = 0.02


def clip_of_mask(path: str) -> str | None:
    """Return the path of a mask's clip without its extension, None for a path that is no mask's."""
    return next((path[: -len(s)] for s in MASK_SUFFIXES if path.endswith(s)), None)


def mask_beside(file: Path) -> Path | None:
    """Return the mask of a clip, None if it has none."""
    stem = file.name.rpartition(".")[0]
    return next((path for s in MASK_SUFFIXES if (path := file.with_name(stem + s)).is_file()), None)


def mask_problem(mask: ClipInfo | Reject, pieces: Sequence[Piece], name: str) -> Reject | None:
    """Return why a mask does not fit the clips that its clip became, None if it does.

    Args:
        mask: what was found in it.
        pieces: the clips.
        name: how a `Reject` names it.
    """
    if isinstance(mask, Reject):
        return Reject("bad_mask", name, f"its mask: {mask.code}: {mask.hint}")
    for piece in pieces:
        clip = piece.info
        if abs(mask.width * clip.height / (mask.height * clip.width) - 1.0) > _MAX_ASPECT_ERROR:
            shapes = f"{mask.width}x{mask.height} px, the clip {clip.width}x{clip.height}"
            return Reject("bad_mask", name, f"its mask is {shapes}; give it the clip's aspect ratio")
        if not mask.fps:
            continue
        if len(pieces) > 1 or piece.start_s:
            return Reject("bad_mask", name, "the clip is cut and its mask is a video; cut both yourself, or use a png")
        if mask.num_frames != clip.num_frames or abs(mask.fps / clip.fps - 1.0) > _MAX_ASPECT_ERROR:
            times = f"{mask.num_frames} frames at {mask.fps:g} fps, the clip {clip.num_frames} at {clip.fps:g}"
            return Reject("bad_mask", name, f"its mask has {times}; export both alike")
    return None
