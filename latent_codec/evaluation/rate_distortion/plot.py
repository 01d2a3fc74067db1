"""Draw rate-distortion curves, one panel per metric."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from latent_codec.evaluation.rate_distortion.report import REFINED, RateDistortionReport, RatePoint, curve_points
from latent_codec.metrics.bjontegaard import SCALES

_STYLES: dict[str, dict[str, Any]] = {
    "context": {"color": "#c1272d", "marker": "o"},
    REFINED: {"color": "#7a1020", "marker": "v"},
    "factorized": {"color": "#e8871e", "marker": "o", "ls": "-."},
    "JPEG": {"color": "#555555", "marker": "s"},
    "WebP": {"color": "#2a7f4f", "marker": "^"},
    "AVIF": {"color": "#2b5fa8", "marker": "D"},
}
_OWN = {"context": "context prior", REFINED: "refined", "factorized": "factorised prior"}


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

PublishedPoints = Mapping[str, Sequence[tuple[float, float]]]
"""(bits per pixel, PSNR in dB) by codec."""


def png(report: RateDistortionReport) -> bytes:
    """Return a PNG of a report's curves."""
    return _saved(_figure(report.points, _title(report.about), "ours", {}), "png")


def svg(points: Sequence[RatePoint], about: dict[str, Any], model: str, published: PublishedPoints) -> str:
    """Return an SVG of curves, those of `model` first, with published ones dashed; equal input gives equal bytes."""
    return _saved(_figure(points, f"{_title(about)}; dashed: published", model, published), "svg").decode()


def _title(about: dict[str, Any]) -> str:
    return f"{about['set']}, {about['images']} images, means; bits per pixel of whole files"


def _saved(figure: Figure, kind: str) -> bytes:
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "latent_codec", "svg.fonttype": "none"}):
        metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        figure.savefig(file, format=kind, dpi=130, metadata=metadata)
    return file.getvalue()


def _figure(points: Sequence[RatePoint], title: str, model: str, published: PublishedPoints) -> Figure:
    """Draw a panel for each metric that was measured; published curves are in the panel of PSNR alone."""
    shown = [panel for panel in _PANELS if any(p.distortion.get(panel.metric) is not None for p in points)]
    figure = Figure(figsize=(5.2 * len(shown), 4.9), layout="constrained")
    right = 1.05 * max(point.bpp for point in curve_points(points, points[0].setting.codec))
    for panel, axes in zip(shown, figure.subplots(1, len(shown), squeeze=False)[0], strict=True):
        _draw_curves(axes, panel, points, model)
        for i, (name, values) in enumerate(published.items() if panel.metric == "psnr" else ()):
            style = {"color": colormaps["Dark2"](i % 8), "ls": "--", "lw": 1.1, "zorder": 1.5}
            axes.plot(*zip(*values, strict=True), label=f"{name} (published)", **style)
        axes.set_xlim(0, right)
        _fit_height(axes, panel)
        axes.set_xlabel("bits per pixel")
        axes.set_title(panel.axis, fontsize=10)
        axes.grid(True, which="both", color="#dddddd", lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(len(labels), 2 + 2 * len(shown))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_curves(axes: Axes, panel: _Panel, points: Sequence[RatePoint], model: str) -> None:
    for depth, codec in enumerate(dict.fromkeys(point.setting.codec for point in points)):  # ours on top
        label = f"{model}, {_OWN[codec]}" if codec in _OWN else codec
        xs, ys = _coordinates(curve_points(points, codec), panel)
        axes.plot(xs, ys, ms=4, lw=1.6, zorder=3 - 0.1 * depth, label=label, **_STYLES[codec])
        xs, ys = _coordinates([p for p in points if p.setting.codec == codec and p.setting.dithered], panel)
        if xs and model == "ours":
            color = _STYLES[codec]["color"]
            axes.plot(xs, ys, "o", mfc="white", mec=color, mew=1.6, ms=7, label="with dither, step 1")


def _coordinates(points: Sequence[RatePoint], panel: _Panel) -> tuple[list[float], list[float]]:
    defined = [(p.bpp, value) for p in points if (value := p.distortion.get(panel.metric)) is not None]
    scale = SCALES[panel.metric].of if panel.in_decibels else float
    return [x for x, _ in defined], [scale(y) for _, y in defined]


def _fit_height(axes: Axes, panel: _Panel) -> None:
    """Fit the height to what lies within the width, not to the anchors' highest qualities."""
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
