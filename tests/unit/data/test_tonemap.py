"""Clips of high dynamic range in the range that models are trained on."""

import json
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
from av.video.stream import VideoStream

from wan_dist.core.buckets import Bucket
from wan_dist.core.errors import DataError
from wan_dist.data.decode import decode_clip
from wan_dist.data.index import open_shards
from wan_dist.data.pack import pack_clips
from wan_dist.data.pack_rules import ClipRules
from wan_dist.data.reader import locate, read_json, read_member
from wan_dist.data.tonemap import _nits_to_pq, to_standard_range

CODES = {"PQ": ("smpte2084", 16), "HLG": ("arib-std-b67", 18)}
PQ_OF_NITS = {0: 0.0, 1: 0.1499, 100: 0.5081, 203: 0.5807, 1000: 0.7518, 10_000: 1.0}
"""Source: ITU-R BT.2408, table 1 and SMPTE ST 2084."""


def gray(signal: float) -> np.ndarray:
    return np.full((1, 3), signal)


def test_dark_stays_and_bright_is_compressed() -> None:
    out = {nits: float(to_standard_range(gray(pq), "PQ")[0, 1]) for nits, pq in PQ_OF_NITS.items()}
    assert out[0] == pytest.approx(0, abs=1e-3)
    # Below the knee light is unchanged: 1 of 203 cd/m2, behind a gamma of 2.4.
    assert out[1] == pytest.approx((1 / 203) ** (1 / 2.4), abs=2e-3)
    assert out[1] < out[100] < out[203] < out[1000]
    assert (out[1000], out[10_000]) == (pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-3))
    # HLG's reference white, 75 % of the signal, is 203 cd/m2 too.
    assert float(to_standard_range(gray(0.75), "HLG")[0, 0]) == pytest.approx(out[203], abs=2e-3)
    ramp = np.linspace(0, 1, 200)
    for transfer in CODES:
        mapped = to_standard_range(np.repeat(ramp[:, None], 3, 1), transfer)
        assert (np.diff(mapped[:, 0]) >= -1e-9).all()
        np.testing.assert_allclose(mapped, mapped[:, :1].repeat(3, 1), atol=2e-3)  # gray stays gray


def test_hues_stay_while_brightness_is_compressed() -> None:
    nits = np.array([[5.0, 4.5, 4.2]])
    dark, bright = (to_standard_range(_nits_to_pq(nits * factor), "PQ")[0] ** 2.4 for factor in (1, 60))
    np.testing.assert_allclose(bright / bright[1], dark / dark[1], rtol=1e-3)
    # 300 cd/m2 would be over white.
    assert bright.max() < 1


def write_patches(path: Path, transfer: str, signals: list[float]) -> None:
    """Write vertical stripes of gray, 10 bits, tagged as BT.2020."""
    tag, code = CODES[transfer]
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=24))
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p10le"
        stream.options = {
            "preset": "ultrafast",
            "qp": "0",
            "x264-params": f"colorprim=bt2020:colormatrix=bt2020nc:transfer={tag}",
        }
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, code, 9, 1
        luma = np.repeat([round(64 + 876 * s) for s in signals], 160 // len(signals))
        for number in range(12):
            frame = av.VideoFrame(160, 96, "yuv420p10le")
            for plane, row in zip(frame.planes, (luma, np.full(80, 512), np.full(80, 512)), strict=True):
                pixels = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                pixels[:, : len(row)] = row
                plane.update(pixels.tobytes())
            frame.pts = number
            frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range = 9, code, 9, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("transfer", CODES)
def test_packed_clips_have_the_mapped_colours(tmp_path: Path, transfer: str) -> None:
    signals = [0.0, 0.2, 0.4, 0.5081, 0.5807, 0.65, 0.7518, 0.9]
    (tmp_path / "clips: 'hdr'").mkdir()
    write_patches(tmp_path / "clips: 'hdr'" / "a.mp4", transfer, signals)
    (tmp_path / "clips: 'hdr'" / "a.txt").write_text("stripes")
    result = pack_clips(tmp_path / "clips: 'hdr'", tmp_path / "out", rules=ClipRules(tonemap=True))
    assert (result.rejects, result.warnings) == ({}, {"tone_mapped": 1})
    shards = open_shards(tmp_path / "out")
    described, media = (locate(shards.tar_path(0), shards.index(0)[0], member) for member in ("json", "media"))
    assert read_json(described)["warnings"] == ["tone_mapped"]
    content = read_member(media)
    frames = decode_clip(content, Bucket(160, 96, 12), fps=24)
    found = frames[5, 48, 10::20].astype(float)
    wanted = to_standard_range(np.repeat(np.array(signals)[:, None], 3, 1), transfer) * 255
    # 8-bit limited range and H.264 at CRF 18 cost up to two levels each.
    np.testing.assert_allclose(found, wanted, atol=5)


def test_hdr_is_refused_by_default(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name, transfer in (("a", "PQ"), ("b", "HLG")):
        write_patches(tmp_path / "clips" / f"{name}.mp4", transfer, [0.2, 0.6])
        (tmp_path / "clips" / f"{name}.txt").write_text("stripes")
    with pytest.raises(DataError, match="2 hdr"):
        pack_clips(tmp_path / "clips", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [("--tonemap" in row["hint"], row["code"]) for row in rows] == [(True, "hdr")] * 2
