"""Every odd and broken file is packed or rejected with the right reason, and the frames are the right ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.clips import read_numbers
from tests.corpus import CASES, Case, write_corpus
from wan_dist.core.buckets import Bucket
from wan_dist.data.decode import decode_clip
from wan_dist.data.index import open_shards
from wan_dist.data.pack import pack_clips
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.reader import locate, read_json, read_member

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class Packed:
    """What a folder of shards says about every file."""

    def __init__(self, corpus: Path, out: Path, rules: ClipRules) -> None:
        pack_clips(corpus, out, rules=rules)
        shards = open_shards(out)
        self.rejects, self.warnings = (
            {row["path"]: row for row in map(json.loads, (out / name).read_text().splitlines())}
            for name in ("rejects.jsonl", "warnings.jsonl")
        )
        self.samples: dict[str, tuple[dict[str, Any], bytes]] = {}
        for row in shards.index(0):
            described, media = (locate(shards.tar_path(0), row, member) for member in ("json", "media"))
            self.samples[read_json(described)["path"]] = read_json(described), read_member(media)


@pytest.fixture(scope="module")
def decoded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(corpus, tmp_path_factory.mktemp("decoded"), ClipRules(verify="decode"))


@pytest.fixture(scope="module")
def probed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(corpus, tmp_path_factory.mktemp("probed"), ClipRules())


@pytest.fixture(scope="module")
def encoded(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    rules = ClipRules(transcode="480p", salvage=True, deinterlace=True)
    return Packed(corpus, tmp_path_factory.mktemp("encoded"), rules)


@pytest.mark.parametrize("name", BY_NAME)
def test_decoding_finds_the_reason(decoded: Packed, name: str) -> None:
    case = BY_NAME[name]
    if case.code:
        found = decoded.rejects[name]
        assert found["code"] == case.code, found
        assert len(found["hint"]) > 10
        assert name not in decoded.samples
    else:
        described, _ = decoded.samples[name]
        assert described["warnings"] == list(case.warnings)
        assert (described["width"], described["height"]) == case.size
        if case.num_frames > 0:
            assert described["num_frames"] == case.num_frames
        assert {decoded.warnings[name]["code"]} == set(case.warnings) if case.warnings else name not in decoded.warnings


@pytest.mark.parametrize("name", BY_NAME)
def test_probing_finds_all_but_damage_inside_frames(probed: Packed, name: str) -> None:
    case = BY_NAME[name]
    assert (name in probed.rejects) == bool(case.code and not case.unseen)
    assert (name in probed.samples) == (name not in probed.rejects)


def barcodes(case: Case, media: bytes, num_frames: int) -> list[int]:
    width, height = case.size
    frames = decode_clip(
        media, Bucket(width // 2 * 2, height // 2 * 2, num_frames), fps=24, allow_duplicate_frames=True
    )
    return read_numbers(np.rot90(frames, -1, axes=(1, 2)) if "rotated" in case.name else frames)


STEADY = [c for c in CASES if not c.code and c.num_frames == 24 and c.name not in ("black.mp4", "static.mp4")]
STEADY = [c for c in STEADY if c.name not in ("gap.mp4", "vfr.mp4")]


@pytest.mark.parametrize("case", STEADY, ids=lambda c: c.name)
def test_copied_and_encoded_clips_show_the_right_frames(probed: Packed, encoded: Packed, case: Case) -> None:
    for packed in (probed, encoded):
        described, media = packed.samples[case.name]
        assert described["num_frames"] == 24
        assert barcodes(case, media, 24) == list(range(24))
    # Encoded again it is upright, with square pixels, 8 bits and an even size, and it was never enlarged.
    described, _ = encoded.samples[case.name]
    assert (described["width"], described["height"]) == tuple(side + side % 2 for side in case.size)
    assert (described["rotation"], described["warnings"]) == (0, [])


def test_encoding_keeps_times(probed: Packed, encoded: Packed) -> None:
    for name in ("vfr.mp4", "gap.mp4", "h264.mp4"):
        before, after = probed.samples[name][0], encoded.samples[name][0]
        assert after["num_frames"] == before["num_frames"]
        assert after["fps"] == pytest.approx(before["fps"])
        assert after["max_gap_s"] == pytest.approx(before["max_gap_s"], abs=1e-4)


def test_salvage_keeps_the_frames_before_the_damage(corpus: Path, tmp_path: Path) -> None:
    packed = Packed(corpus, tmp_path, ClipRules(verify="decode", salvage=True))
    for name, least, most in (("corrupt.mp4", 13, 14), ("cut.mp4", 10, 50), ("size-change.ts", 12, 12)):
        described, media = packed.samples[name]
        assert "salvaged" in described["warnings"]
        assert least <= described["num_frames"] <= most, name
        numbers = barcodes(BY_NAME[name], media, described["num_frames"])
        assert numbers == list(range(described["num_frames"]))
    # Nothing is invented where there is nothing.
    assert {packed.rejects[name]["code"] for name in ("no-moov.mp4", "ftyp.mp4", "zero.mp4")} == {
        "truncated",
        "empty_file",
    }


def test_nothing_listens_to_addresses_inside_files(decoded: Packed) -> None:
    assert not {"concat.mp4", "hls.mp4", "dash.mp4", "sdp.mp4"} & set(decoded.samples)
