"""Show the rate-distortion curves of `evaluate --rd` in a report."""

import io

from PIL import Image

from latent_codec.evaluation.rate_distortion import plot
from latent_codec.evaluation.rate_distortion.report import RateDistortionReport
from latent_codec.evaluation.report.page import METRICS, Section, embed, left_out, written
from latent_codec.metrics.bjontegaard import Delta

NAME, TITLE = "rate_distortion", "Rate and distortion"


def rate_distortion_section(report: RateDistortionReport | None) -> Section:
    """Show the curves, if `evaluate --rd` measured them."""
    if report is None:
        return left_out(NAME, TITLE, "it was not asked for; add --rd")
    data = plot.png(report)
    with Image.open(io.BytesIO(data)) as opened:
        size = opened.size
    ours = report.codecs[0]
    alt = f"Distortion against bits per pixel: {', '.join(report.codecs)}; the table has the values."
    named = [(f"against {comparison.anchor}", comparison) for comparison in report.against]
    named += [(f"refined, against {comparison.anchor}", comparison) for comparison in report.refined_against]
    view = {
        "plot": embed(data, "png", size, alt),
        "protocol": report.protocol["delta_rate"],
        "delta_head": ["", *(METRICS[name] for name in (named[0][1].delta_rates if named else ()))],
        "deltas": [(words, *map(_percent, comparison.delta_rates.values())) for words, comparison in named],
        "head": (f"{ours} prior", "bits per pixel", *METRICS.values()),
        "points": [
            (point.setting, written(point.bpp), *(written(point.distortion.get(name)) for name in METRICS))
            for point in report.points
            if point.setting.codec == ours
        ],
    }
    records = {
        "points": [point.json() for point in report.points],
        "delta_rates": {c.anchor: c.json()["delta_rates"] for c in report.against},
        "refined_delta_rates": {c.anchor: c.json()["delta_rates"] for c in report.refined_against},
        "protocol": report.protocol,
    }
    return Section(NAME, TITLE, view, records=records)


def _percent(delta: Delta) -> str:
    return f"none: {delta.reason}" if delta.percent is None else f"{delta.percent:+.1f} %"
