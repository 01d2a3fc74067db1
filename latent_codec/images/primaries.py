"""Make ICC profiles of colour that is told by primaries and a transfer curve, as PNG's cICP, gAMA and cHRM tell it.

Code points are those of ITU-T H.273, tables 2 and 3.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from latent_codec.errors import UserError

_D65, _D50 = (0.3127, 0.3290), (0.9642, 1.0, 0.8249)
_SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *_D65)
_PRIMARIES: dict[int, tuple[float, ...]] = {
    1: _SRGB,
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *_D65),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),
}
"""x and y of red, green, blue and white."""
_EXPONENTS = {4: 2.2, 5: 2.8, 8: 1.0}
_AS_SRGB = frozenset({1, 2, 6, 13, 14, 15})  # video's curves are shown as sRGB's by browsers; 2 is unspecified
_HDR = {16: "PQ", 18: "HLG"}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


class ColourTags(NamedTuple):
    """Hold the primaries and white, as x and y of each, and the exponent of decoding; None is sRGB's curve."""

    primaries: tuple[float, ...]
    exponent: float | None

    def profile(self) -> bytes:
        """Return an ICC profile of this colour."""
        return _profile(self)


def by_code_points(primaries: int, transfer: int) -> ColourTags | None:
    """Return the colour that two code points stand for; None for sRGB's and unspecified ones.

    Raises `UserError` for high dynamic range, which has no place in 8 bits, and for code points that are not known.
    """
    if transfer in _HDR:
        raise UserError(f"its colour is of high dynamic range ({_HDR[transfer]}); convert it to sRGB first")
    if primaries in (1, 2) and transfer in _AS_SRGB:
        return None
    if primaries not in (2, *_PRIMARIES) or transfer not in (*_AS_SRGB, *_EXPONENTS):
        raise UserError(
            f"its colour has primaries {primaries} and transfer {transfer} of ITU-T H.273; convert it to sRGB"
        )
    return ColourTags(_PRIMARIES.get(primaries, _SRGB), _EXPONENTS.get(transfer))


def by_chromaticities(white_and_primaries: Sequence[int] | None, gamma: float | None) -> ColourTags | None:
    """Return the colour of PNG's cHRM, in 1 / 100000, and gAMA, each None if missing; None for sRGB's.

    A missing one is taken for sRGB's, as browsers do.
    """
    primaries = _SRGB
    if white_and_primaries is not None:
        wx, wy, *rest = (value / 1e5 for value in white_and_primaries)
        primaries = (*rest, wx, wy)
    if not all(0 < value < 1 for value in primaries[1::2]) or (gamma is not None and not 0.1 <= gamma <= 10):
        return None  # nonsense, as broken metadata have it
    exponent = None if gamma is None or abs(gamma - 1 / 2.2) < 0.005 else 1 / gamma
    is_srgb = np.allclose(primaries, _SRGB, atol=0.002) and exponent is None
    return None if is_srgb else ColourTags(primaries, exponent)


@lru_cache(maxsize=32)
def _profile(tags: ColourTags) -> bytes:
    curve = np.linspace(0, 1, 4096)
    if tags.exponent is None:
        curve = np.where(curve <= 0.04045, curve / 12.92, ((curve + 0.055) / 1.055) ** 2.4)
    else:
        curve = curve**tags.exponent
    trc = b"curv" + struct.pack(">II", 0, len(curve)) + (curve * 65535).round().astype(">u2").tobytes()
    columns = _to_xyz_d50(tags.primaries)
    colours = [b"XYZ \0\0\0\0" + _fixed(column) for column in columns.T]
    white = b"XYZ \0\0\0\0" + _fixed(np.array(_D50))
    text = b"desc\0\0\0\0" + struct.pack(">I", 1) + b"\0" * 79
    tables = [(b"desc", text), (b"cprt", b"text\0\0\0\0\0\0\0\0"), (b"wtpt", white)]
    tables += list(zip((b"rXYZ", b"gXYZ", b"bXYZ"), colours, strict=True))
    tables += [(name, trc) for name in (b"rTRC", b"gTRC", b"bTRC")]
    offset, entries, data = 128 + 4 + 12 * len(tables), b"", b""
    for name, content in tables:
        content += b"\0" * (-len(content) % 4)
        entries += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    header = struct.pack(">I4sI4s4s4s", offset + len(data), b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(np.array(_D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tables)) + entries + data


def _fixed(values: np.ndarray) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def _to_xyz_d50(primaries: tuple[float, ...]) -> np.ndarray:
    """Return the matrix from linear RGB to XYZ, adapted to D50 (Lindbloom; Bradford's cone response)."""
    xy = np.array(primaries).reshape(4, 2)
    xyz = np.stack([xy[:, 0] / xy[:, 1], np.ones(4), (1 - xy.sum(1)) / xy[:, 1]])  # (3, 4), of luminance 1
    white = xyz[:, 3]
    scaled = xyz[:, :3] * np.linalg.solve(xyz[:, :3], white)
    cone = _BRADFORD @ np.array(_D50) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ np.diag(cone) @ _BRADFORD @ scaled
