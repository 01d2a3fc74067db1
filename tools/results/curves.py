"""Rate-distortion curves of a measured file and of the published ones, and how far apart they are."""

from typing import Any

from latent_codec.metrics.bjontegaard import SCALES, Curve, Delta, delta_rate
from tools.results.published import CURVES, PublishedCurve

PUBLISHED_OVERLAP = 0.25
"""Published curves begin at higher qualities than ours, so that less of ours is asked for; the page says how much."""

METRICS = ("psnr", "ms_ssim", "lpips")


def points(rd: dict[str, Any], codec: str) -> list[dict[str, Any]]:
    """Means over images of one codec's settings, without dither."""
    return [p for p in rd["summary"]["points"] if p["codec"] == codec and not p["dithered"]]


def best(rd: dict[str, Any]) -> str:
    """Our best prior, whose rows come first."""
    return rd["summary"]["points"][0]["codec"]


def metrics_of(rd: dict[str, Any]) -> list[str]:
    """Those that were measured and are defined for images of this size."""
    return [name for name in METRICS if any(p.get(name) is not None for p in rd["summary"]["points"])]


def curve(rd: dict[str, Any], codec: str, metric: str) -> Curve:
    own = points(rd, codec)
    return Curve.of([p["bpp"] for p in own], [p[metric] for p in own], SCALES[metric])


def published(rd: dict[str, Any]) -> tuple[PublishedCurve, ...]:
    """The curves to set beside those measured: none, if the images were others than all of Kodak's."""
    about = rd["about"]
    return CURVES if about["set"].lower() == "kodak" and about["images"] == 24 else ()


def against_published(rd: dict[str, Any], codec: str) -> list[tuple[PublishedCurve, Delta]]:
    """Delta rates of one of our kinds of files in PSNR, where the curves overlap; none if there are no such files."""
    if not points(rd, codec):
        return []
    ours = curve(rd, codec, "psnr")
    found = []
    for other in published(rd):
        anchor = Curve.of([x for x, _ in other.points], [y for _, y in other.points], SCALES["psnr"])
        found.append((other, delta_rate(anchor, ours, PUBLISHED_OVERLAP)))
    return found
