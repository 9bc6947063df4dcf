"""High dynamic range to the standard range that models are trained on, as a lookup table for FFmpeg's `lut3d`.

FFmpeg's own `tonemap` needs linear light, which only zscale makes, and PyAV's FFmpeg is built without it.
"""

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

TRANSFERS: Final = {16: "PQ", 18: "HLG"}
"""FFmpeg's AVColorTransferCharacteristic numbers of high dynamic range. Source: ITU-T H.273, table 3."""

PEAK_NITS: Final = 1000.0
"""Brightness that is mapped to white, cd/m2, as is what is brighter. The usual mastering peak, and that of HLG."""

WHITE_NITS: Final = 203.0
"""Brightness of white in the standard range, cd/m2. Source: ITU-R BT.2408, reference white."""

_SIZE: Final = 33
_BT2020_LUMA: Final = np.array([0.2627, 0.6780, 0.0593])
_BT2020_TO_BT709: Final = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]]
)
"""Source: ITU-R BT.2087, inverse of its M2."""


def write_table(path: Path, transfer: str) -> None:
    """Write the lookup table of a transfer ("PQ" or "HLG") as a .cube file."""
    axis = np.linspace(0, 1, _SIZE)
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")  # red changes fastest
    values = to_standard_range(np.stack([red, green, blue], axis=-1).reshape(-1, 3), transfer)
    rows = "\n".join(f"{r:.6f} {g:.6f} {b:.6f}" for r, g, b in values.tolist())
    path.write_text(f"LUT_3D_SIZE {_SIZE}\n{rows}\n")


def to_standard_range(encoded: NDArray[np.float64], transfer: str) -> NDArray[np.float64]:
    """Return BT.709 colours, [N, 3] in 0..1, of BT.2020 colours encoded as PQ or HLG, [N, 3] in 0..1.

    The brightest of the three is compressed and the others with it, so that hues stay; colours outside BT.709 are
    clipped.

    Source: ITU-R BT.2390-8 section 5.4.1 (EETF, from 1000 to 203 cd/m2), BT.1886 (gamma 2.4).
    """
    nits = _pq_to_nits(encoded) if transfer == "PQ" else _hlg_to_nits(encoded)
    brightest = np.maximum(nits.max(axis=1, keepdims=True), 1e-6)
    mapped = nits * (_compressed(brightest) / brightest)
    linear = (mapped / WHITE_NITS) @ _BT2020_TO_BT709.T
    return np.clip(linear, 0, 1) ** (1 / 2.4)


def _compressed(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return brightness 0..1000 cd/m2 as 0..203, unchanged where it is dark."""
    peak = _nits_to_pq(np.array(PEAK_NITS))
    signal = np.minimum(_nits_to_pq(nits) / peak, 1)
    white = _nits_to_pq(np.array(WHITE_NITS)) / peak
    knee = 1.5 * white - 0.5
    t = np.clip((signal - knee) / (1 - knee), 0, 1)
    curve = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * white
    )  # fmt: skip
    return _pq_to_nits(np.where(signal < knee, signal, curve) * peak)


def _pq_to_nits(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Source: SMPTE ST 2084, EOTF."""
    power = signal ** (1 / 78.84375)
    return 10_000 * (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)


def _nits_to_pq(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    power = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def _hlg_to_nits(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Source: ITU-R BT.2100, inverse OETF and OOTF of a display of 1000 cd/m2 (gamma 1.2)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luma = np.maximum(scene @ _BT2020_LUMA, 1e-9)[:, None]
    return PEAK_NITS * luma**0.2 * scene
