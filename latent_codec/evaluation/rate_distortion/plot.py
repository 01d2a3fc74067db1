"""Rate-distortion curves as a picture."""

import io
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from latent_codec.evaluation.rate_distortion.report import REFINED, Point, Report
from latent_codec.metrics.bjontegaard import SCALES
from latent_codec.storage.files import atomic_path


class _Style(NamedTuple):
    label: str
    colour: str
    marker: str
    line: str


_STYLES = {
    "context": _Style("ours, context prior", "#c1272d", "o", "-"),
    REFINED: _Style("ours, refined", "#7a1020", "v", "-"),
    "factorized": _Style("ours, factorised prior", "#e8871e", "o", "--"),
    "JPEG": _Style("JPEG", "#555555", "s", "-"),
    "WebP": _Style("WebP", "#2a7f4f", "^", "-"),
    "AVIF": _Style("AVIF", "#2b5fa8", "D", "-"),
}


class _Panel(NamedTuple):
    metric: str
    axis: str
    in_decibels: bool
    logarithmic: bool


_PANELS = (
    _Panel("psnr", "PSNR, dB", False, False),
    _Panel("ms_ssim", "MS-SSIM, -10 log10(1 - x), dB", True, False),
    _Panel("lpips", "LPIPS (lower is better)", False, True),
)


def draw(report: Report, path: Path) -> None:
    """Write `png` to a file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(report))


def png(report: Report) -> bytes:
    """A PNG with one panel per metric that was measured."""
    shown = [p for p in _PANELS if any(point.distortion.get(p.metric) is not None for point in report.points)]
    figure = Figure(figsize=(5.2 * len(shown), 4.8), layout="constrained")
    for panel, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        _draw_panel(report, panel, axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    about = report.about
    figure.suptitle(f"{about['set']}, {about['images']} images, means; bits per pixel of whole files", fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def _draw_panel(report: Report, panel: _Panel, axes: Axes) -> None:
    for depth, codec in enumerate(report.codecs):  # ours on top
        style = _STYLES[codec]
        xs, ys = _coordinates(report.curve_points(codec), panel)
        look = {"color": style.colour, "marker": style.marker, "zorder": 3 - 0.1 * depth, "label": style.label}
        axes.plot(xs, ys, style.line, ms=4, lw=1.6, **look)
        dithered = [p for p in report.points if p.setting.codec == codec and p.setting.dithered]
        xs, ys = _coordinates(dithered, panel)
        if xs:
            axes.plot(xs, ys, "o", mfc="white", mec=style.colour, mew=1.6, ms=7, label="with dither, step 1")
    axes.set_xlim(0, 1.05 * max(p.bpp for p in report.points if p.setting.unit == "step"))
    _fit_height(axes, panel)
    axes.set_xlabel("bits per pixel")
    axes.set_title(panel.axis, fontsize=10)
    axes.grid(True, which="both", color="#dddddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _coordinates(points: list[Point], panel: _Panel) -> tuple[list[float], list[float]]:
    defined = [(p.bpp, value) for p in points if (value := p.distortion.get(panel.metric)) is not None]
    of = SCALES[panel.metric].of
    return [x for x, _ in defined], [of(y) if panel.in_decibels else y for _, y in defined]


def _fit_height(axes: Axes, panel: _Panel) -> None:
    """Room for what lies within the width, not for the peers' highest qualities."""
    right = axes.get_xlim()[1]
    lines: Any = axes.get_lines()
    inside = [y for line in lines for x, y in zip(*line.get_data(), strict=True) if x <= right]
    low, high = min(inside), max(inside)
    if panel.logarithmic and low > 0:
        axes.set_yscale("log")
        axes.set_ylim(low * 0.85, high * 1.15)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
