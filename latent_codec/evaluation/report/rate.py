"""The rate-distortion curves of `evaluate --rd` in a report."""

import io

from PIL import Image

from latent_codec.evaluation.rate_distortion import plot
from latent_codec.evaluation.rate_distortion.report import Report
from latent_codec.evaluation.report.html import Html, image, join, paragraphs, table, tag
from latent_codec.evaluation.report.page import METRICS, Section, left_out, written
from latent_codec.metrics.bjontegaard import Delta

NAME, TITLE = "rate_distortion", "Rate and distortion"


def rate_distortion(report: Report | None) -> Section:
    """`report` is what `evaluate --rd` found, if it was asked for."""
    if report is None:
        return left_out(NAME, TITLE, "nobody asked for it; add --rd")
    data = plot.png(report)
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    ours = report.codecs[0]
    alt = f"Distortion against bits per pixel: {', '.join(report.codecs)}; the table has the values."
    figure = tag("figure", image(data, "png", width, height, alt), class_="wide")
    rows: list[tuple[object, ...]] = [
        (point.setting, written(point.bpp), *(written(point.distortion.get(m)) for m in METRICS))
        for point in report.points
        if point.setting.codec == ours
    ]
    head = (f"{ours} prior", "bits per pixel", *METRICS.values())
    every = tag("details", tag("summary", "Our files, step by step"), table(head, rows))
    words = paragraphs(
        "Whole files of every step, decoded again. The table: how many bytes more or less (below 0) ours take at equal "
        f"quality; {report.protocol['delta_rate']}."
    )
    records = {
        "points": [p.json() for p in report.points],
        "delta_rates": {a.peer: a.json()["delta_rates"] for a in report.against},
        "refined_delta_rates": {a.peer: a.json()["delta_rates"] for a in report.refined_against},
        "protocol": report.protocol,
    }
    return Section(NAME, TITLE, join(words, figure, _delta_rates(report), every), [], records)


def _delta_rates(report: Report) -> Html:
    if not report.against:
        return Html()
    head = ("", *(METRICS[name] for name in report.against[0].delta_rates))
    named = [(f"against {a.peer}", a) for a in report.against]
    named += [(f"refined, against {a.peer}", a) for a in report.refined_against]
    return table(head, [(words, *map(_percent, a.delta_rates.values())) for words, a in named])


def _percent(delta: Delta) -> str:
    return f"none: {delta.reason}" if delta.percent is None else f"{delta.percent:+.1f} %"
