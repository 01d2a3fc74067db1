"""Test the identities of the delta rate, and when there is none."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latent_codec.errors import UserError
from latent_codec.metrics.bjontegaard import SCALES, Curve, check_extra, delta_rate

RATES = [0.2, 0.35, 0.5, 0.8, 1.3]
PSNR = [26.0, 28.5, 30.0, 32.5, 35.0]


def psnr_curve(rates: list[float], values: list[float | None]) -> Curve:
    return Curve.of(rates, values, SCALES["psnr"])


@given(st.floats(0.1, 10))
@example(1.0)
@example(0.5)
def test_a_curve_of_k_times_the_rate_needs_k_times_as_much(k: float) -> None:
    other = psnr_curve([k * rate for rate in RATES], [*PSNR])
    delta = delta_rate(psnr_curve(RATES, [*PSNR]), other)
    assert delta.percent == pytest.approx(100 * (k - 1), abs=1e-6)
    assert (delta.low, delta.high, delta.share, delta.left_out) == (26, 35, 1, 0)


def test_curves_that_hardly_overlap_have_no_delta_rate_but_a_reason() -> None:
    for count, higher, reason in ((5, 8, "11%"), (5, 20, "share 0%"), (3, 8, "3 points")):
        above = psnr_curve(RATES, [p + higher for p in PSNR])
        delta = delta_rate(psnr_curve(RATES[:count], [*PSNR[:count]]), above)
        assert delta.percent is None and reason in (delta.reason or "")
    halves = psnr_curve([0.05, 0.1, 0.2, 0.4], [20.0, 24.0, 28.0, 32.0])
    anchor = psnr_curve([0.2, 0.4, 0.8, 1.6, 3.2], [24.0, 28.0, 32.0, 36.0, 40.0])
    assert delta_rate(anchor, halves, 0.9).percent is None
    assert delta_rate(anchor, halves, 0.25).percent == pytest.approx(-50, abs=0.1)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.one_of(st.none(), st.floats(1, 60))), max_size=12))
def test_a_curve_keeps_exactly_the_points_that_no_cheaper_one_equals(points: list[tuple[float, float | None]]) -> None:
    curve = psnr_curve([rate for rate, _ in points], [value for _, value in points])
    defined = {(rate, value) for rate, value in points if value is not None}
    best = sorted(p for p in defined if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in defined))
    assert list(zip(curve.rates, curve.qualities, strict=True)) == best and curve.left_out == len(points) - len(best)


def test_more_is_better_on_every_scale() -> None:
    for name, worse, better in (("psnr", 30, 31), ("ms_ssim", 0.9, 0.99), ("lpips", 0.2, 0.1)):
        assert SCALES[name].of(better) > SCALES[name].of(worse)
    assert SCALES["ms_ssim"].of(0.99) == pytest.approx(20) and SCALES["lpips"].of(0.1) == pytest.approx(10)
    assert math.isfinite(SCALES["ms_ssim"].of(1.0)) and math.isfinite(SCALES["lpips"].of(0.0))


def test_quality_at_a_rate_goes_through_the_points_and_ends_with_them() -> None:
    curve = psnr_curve(RATES, [*PSNR])
    assert [curve.at(rate) for rate in RATES] == pytest.approx(PSNR) and PSNR[1] < (curve.at(0.4) or 0) < PSNR[2]
    assert curve.at(0.19) is None and curve.at(1.31) is None
    line = psnr_curve([0.1, 0.2, 0.4, 0.8], [20.0, 22.0, 24.0, 26.0])  # straight over the logarithm of the rate
    assert line.at(0.2 * 2**0.5) == pytest.approx(23)


def test_missing_packages_are_named_with_the_extra_that_brings_them() -> None:
    check_extra()
    with pytest.raises(UserError, match=r"bjontegaard_of_nowhere, which is not installed: pip install .*\[rd\]"):
        check_extra(("numpy", "bjontegaard_of_nowhere"))
