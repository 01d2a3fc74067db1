"""Read rate-distortion curves from rd.json, and compare them with published curves."""

from typing import Any

from latent_codec.evaluation.rate_distortion.report import RatePoint, rate_curve
from latent_codec.evaluation.rate_distortion.report import curve_points as points_of
from latent_codec.metrics.bjontegaard import SCALES, Curve, Delta, delta_rate
from tools.results.published import CURVES, PublishedCurve

PUBLISHED_OVERLAP = 0.25
"""Share of our range that a published curve must cover; they begin at higher qualities than ours."""

METRICS = ("psnr", "ms_ssim", "lpips")


def all_points(rd: dict[str, Any]) -> list[RatePoint]:
    """Return the means over images of all settings, our best prior first."""
    return [RatePoint.from_json(point) for point in rd["summary"]["points"]]


def curve_points(rd: dict[str, Any], codec: str) -> list[RatePoint]:
    """Return the points of one codec without dither."""
    return points_of(all_points(rd), codec)


def best(rd: dict[str, Any]) -> str:
    """Return the name of our best prior, whose rows come first."""
    return rd["summary"]["points"][0]["codec"]


def metrics_of(rd: dict[str, Any]) -> list[str]:
    """Return the metrics that were measured and are defined for images of this size."""
    return [name for name in METRICS if any(p.get(name) is not None for p in rd["summary"]["points"])]


def published(rd: dict[str, Any]) -> list[PublishedCurve]:
    """Return the published curves of the measured set: those of Kodak, or none."""
    about = rd["about"]
    return CURVES if about["set"].lower() == "kodak" and about["images"] == 24 else []


def against_published(rd: dict[str, Any], codec: str) -> list[tuple[PublishedCurve, Delta]]:
    """Return delta rates in PSNR of one of our kinds of files against each published curve."""
    points = all_points(rd)
    if not points_of(points, codec):
        return []
    ours, found = rate_curve(points, codec, "psnr"), []
    for other in published(rd):
        anchor = Curve.of([x for x, _ in other.points], [y for _, y in other.points], SCALES["psnr"])
        found.append((other, delta_rate(anchor, ours, PUBLISHED_OVERLAP)))
    return found
