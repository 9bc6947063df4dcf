"""What packing does to every clip: how it is checked, cut and filtered."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

import av

from wan_dist.core.errors import ConfigError

Verify = Literal["none", "probe", "decode"]

TRANSCODE_SIZES: Final[dict[str, tuple[int, int]]] = {"480p": (832, 480), "720p": (1280, 720)}
"""Official WAN sizes, px. A transcoded clip still covers every bucket of that area, whatever its aspect."""

TRANSCODE_RULES: Final = 1
"""Counted up with every change that alters transcoded bytes, so that an unfinished pack is not continued with it."""


@dataclass(frozen=True)
class ClipRules:
    """How clips are checked, cut and filtered.

    Attributes:
        verify: `none` decodes the first frame and believes the file's header for the rest, `probe` reads all packets
            too, `decode` decodes every frame.
        salvage: keep the whole frames before the first damage of a clip, encoded again.
        transcode: a key of `TRANSCODE_SIZES`: encode again as H.264, scaled down to just cover that size.
        deinterlace: encode interlaced clips again, without the combs.
        tonemap: encode clips of high dynamic range again, in the standard range.
        scene_split: cut clips where the scene changes.
        max_clip_s: cut clips into equal parts no longer than this, seconds.
        min_seconds: leave out shorter clips, seconds.
        max_seconds: leave out longer clips, seconds.
        min_side_px: leave out clips whose shorter side is less, px.
        drop_static: leave out clips in which nothing moves.
        drop_black: leave out black clips.
    """

    verify: Verify = "probe"
    salvage: bool = False
    transcode: str | None = None
    deinterlace: bool = False
    tonemap: bool = False
    scene_split: bool = False
    max_clip_s: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None
    min_side_px: int | None = None
    drop_static: bool = False
    drop_black: bool = False

    def __post_init__(self) -> None:
        if self.transcode is not None and self.transcode not in TRANSCODE_SIZES:
            raise ConfigError(f"--transcode {self.transcode} is not known; use one of {', '.join(TRANSCODE_SIZES)}.")
        if self.max_clip_s is not None and self.max_clip_s <= 0:
            raise ConfigError(f"--max-clip-seconds {self.max_clip_s:g} is not over 0; 10 is a usual value.")

    @property
    def splits(self) -> bool:
        """Whether one file may become several clips."""
        return self.scene_split or self.max_clip_s is not None

    @property
    def looks_at_frames(self) -> bool:
        """Whether every frame has to be decoded before it is known what becomes of a clip."""
        return self.verify == "decode" or self.scene_split or self.drop_static or self.drop_black

    def record(self) -> dict[str, Any]:
        """Return what differs from the defaults, and the libraries that shape the bytes if clips are encoded."""
        defaults = ClipRules()
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        record = {name: value for name, value in changed.items() if value != getattr(defaults, name)}
        if self.splits or self.transcode or self.salvage or self.deinterlace or self.tonemap:
            record["encoder"] = f"PyAV {av.__version__}, FFmpeg {av.ffmpeg_version_info}, rules {TRANSCODE_RULES}"
        return record

    def as_json(self) -> dict[str, Any]:
        """Return all fields, for a worker process."""
        return asdict(self)
