"""The rate-distortion curves of `evaluate --rd` in a report."""

import io

from PIL import Image

from latent_codec import rd_plot
from latent_codec.rd_report import Report
from latent_codec.report.html import image, paragraphs, table, tag
from latent_codec.report.page import Number, Section, left_out, written

NAME, TITLE = "rate_distortion", "Rate and distortion"


def rate_distortion(report: Report | None) -> Section:
    """`report` is what `evaluate --rd` found, if it was asked for."""
    if report is None:
        return left_out(NAME, TITLE, "nobody asked for it; add --rd")
    data = rd_plot.png(report)
    with Image.open(io.BytesIO(data)) as opened:
        width, height = opened.size
    ours = report.codecs[0]
    alt = f"Distortion against bits per pixel: {', '.join(report.codecs)}; the table has the values."
    figure = tag("figure", image(data, "png", width, height, alt), class_="wide")
    rows: list[tuple[object, ...]] = [
        (point.setting, written(point.bpp), *(written(point.distortion.get(m)) for m in ("psnr", "ms_ssim", "lpips")))
        for point in report.points
        if point.setting.codec == ours
    ]
    head = (f"{ours} prior", "bits per pixel", "PSNR, dB", "MS-SSIM", "LPIPS")
    every = tag("details", tag("summary", "Our files, step by step"), table(head, rows))
    numbers = [
        Number(
            f"delta_rate_{a.peer.lower()}_{metric}",
            f"bytes against {a.peer}, by {metric.replace('_', '-')}",
            delta.percent,
            "%",
            report.protocol["delta_rate"] if delta.reason is None else delta.reason,
        )
        for a in report.against
        for metric, delta in a.delta_rates.items()
    ]
    words = paragraphs("Whole files of every step, decoded again; below 0 % ours take fewer bytes at equal quality.")
    return Section(
        NAME, TITLE, tag("div", words, figure, every), numbers, {"points": [p.json() for p in report.points]}
    )
