"""Compare rate-distortion curves: quality at equal rate, and Bjontegaard's delta rate at equal quality."""

import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from latent_codec.errors import UserError

EXTRA = ("bjontegaard", "jinja2", "matplotlib")
"""Packages that only rate-distortion curves and reports need: the extra `rd`."""

METHOD = "pchip"
"""Interpolation of this module and of bjontegaard: piecewise cubic, monotone (Fritsch & Butland 1984)."""

LEAST_POINTS = 4
"""Points that a curve must have for a delta rate."""

LEAST_OVERLAP = 0.5
"""Share of the tested curve's range of quality that the anchor must cover."""


def check_extra(packages: Sequence[str] = EXTRA) -> None:
    """Raise `UserError` unless all packages of the extra are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"rate-distortion curves and reports need {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed: pip install 'latent-codec[rd]'"
        )


class Scale(NamedTuple):
    """Map a metric to a scale where more is better, on which curves are compared."""

    words: str
    of: Callable[[float], float]


def _decibels(distance: float) -> float:
    return -10 * math.log10(max(distance, 1e-12))


SCALES: dict[str, Scale] = {
    "psnr": Scale("PSNR in dB", lambda value: value),
    "ms_ssim": Scale("-10 log10(1 - MS-SSIM) of the mean MS-SSIM", lambda value: _decibels(1 - value)),
    "lpips": Scale("-10 log10(LPIPS) of the mean LPIPS, so that more is better", _decibels),
}


class Curve(NamedTuple):
    """Hold a curve's points by ascending rate; quality ascends with it."""

    rates: np.ndarray  # (n,) float64, bits per pixel
    qualities: np.ndarray  # (n,) float64
    left_out: int
    """Number of points without a value, or that a cheaper point equals or beats."""

    @classmethod
    def of(cls, rates: Sequence[float], values: Sequence[float | None], scale: Scale) -> "Curve":
        """Make a curve of a metric's values, None where it is undefined; only points that no cheaper one beats stay."""
        kept: list[tuple[float, float]] = []
        defined = [(rate, -scale.of(value)) for rate, value in zip(rates, values, strict=True) if value is not None]
        for rate, negative in sorted(defined):
            if not kept or -negative > kept[-1][1]:
                kept.append((rate, -negative))
        found = np.array(kept, np.float64).reshape(-1, 2)
        return cls(found[:, 0], found[:, 1], len(rates) - len(kept))

    def at(self, rate: float) -> float | None:
        """Interpolate quality at a rate over the rate's logarithm; None outside the curve."""
        from scipy.interpolate import PchipInterpolator  # slow to import

        if len(self.rates) < 2 or not self.rates[0] <= rate <= self.rates[-1]:
            return None
        return float(PchipInterpolator(np.log(self.rates), self.qualities)(math.log(rate)))


class Delta(NamedTuple):
    """Hold Bjontegaard's delta rate, or the reason why there is none."""

    percent: float | None
    """Mean difference of log rate at equal quality, in percent; below 0 the tested curve needs less."""
    reason: str | None
    """Reason why `percent` is None."""
    low: float | None
    """Lowest quality that both curves reach, and from which the mean is taken."""
    high: float | None
    """Highest quality that both curves reach."""
    share: float | None
    """Share of the tested curve's range of quality that lies between them."""
    left_out: int
    """Points of both curves that were not used (see `Curve`)."""


def delta_rate(anchor: Curve, tested: Curve, least_overlap: float = LEAST_OVERLAP) -> Delta:
    """Return how much more rate `tested` needs than `anchor` at equal quality (Bjontegaard 2001).

    There is no value, but a reason, where a curve has fewer than `LEAST_POINTS` points or `anchor` covers less than
    `least_overlap` of the range of quality of `tested`. Needs the package `bjontegaard` (see `check_extra`).
    """
    left_out = anchor.left_out + tested.left_out
    fewest = min(len(anchor.rates), len(tested.rates))
    if fewest < LEAST_POINTS:
        return Delta(None, f"a curve has {fewest} points, less than {LEAST_POINTS}", None, None, None, left_out)
    low = float(max(anchor.qualities[0], tested.qualities[0]))
    high = float(min(anchor.qualities[-1], tested.qualities[-1]))
    share = max(high - low, 0.0) / float(tested.qualities[-1] - tested.qualities[0])
    if share < least_overlap:
        reason = f"the curves share {share:.0%} of the tested one's range, less than {least_overlap:.0%}"
        return Delta(None, reason, None, None, share, left_out)
    import bjontegaard  # optional

    curves = anchor.rates, anchor.qualities, tested.rates, tested.qualities
    percent = bjontegaard.bd_rate(*curves, method=METHOD, require_matching_points=False, min_overlap=0)
    return Delta(float(percent), None, low, high, share, left_out)  # pyright: ignore[reportArgumentType]
