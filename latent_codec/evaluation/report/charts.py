"""Draw the report's charts as SVG images."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from latent_codec.evaluation.report.page import EmbeddedImage, embed
from latent_codec.evaluation.report.survey import EDGES, Draws, Survey

_OURS, _LOW, _NORMAL, _SECOND = "#2b5fa8", "#b9bfc7", "#c1272d", "#2a7f4f"


def _chart(figure: Figure, alt: str) -> EmbeddedImage:
    """Embed a figure; equal figures give equal bytes."""
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "latent_codec"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    width, height = (round(96 * side) for side in figure.get_size_inches())
    return embed(file.getvalue(), "svg+xml", (width, height), alt)


def bars(
    values: Sequence[float],
    active: Sequence[bool],
    label: str,
    alt: str,
    *,
    threshold: float | None = None,
    axis: str = "channel",
) -> EmbeddedImage:
    """Draw a bar for each channel or code, the largest first, inactive ones pale; a threshold makes it logarithmic."""
    figure, axes = _axes(axis, label)
    order = np.argsort(-np.asarray(values), kind="stable")
    heights = np.asarray(values)[order]
    if threshold is not None:
        floor = np.clip(heights.min(), threshold / 1000, threshold / 10)  # a dead channel has no variance
        heights = np.maximum(heights, floor)
        axes.set_yscale("log")
        axes.set_ylim(floor, 2 * max(heights.max(), threshold))
        axes.axhline(threshold, color=_NORMAL, lw=1, ls="--")
    axes.bar(range(len(order)), heights, color=[_OURS if active[i] else _LOW for i in order], width=0.8)
    if len(order) <= 64:
        axes.set_xticks(range(len(order)), [str(i) for i in order], fontsize=6, rotation=90)
    return _chart(figure, alt)


def spread(found: Survey, alt: str) -> EmbeddedImage:
    """Draw each channel's mean with one standard deviation of the aggregate posterior either way."""
    figure, axes = _axes("channel", "mean and std")
    channels = range(len(found.mean))
    axes.axhspan(-1, 1, color=_NORMAL, alpha=0.12, lw=0, label="N(0, 1)")
    axes.axhline(0, color=_NORMAL, lw=0.8)
    axes.errorbar(
        channels, found.mean.numpy(), found.std.numpy(), fmt="o", ms=2.5, lw=1, color=_OURS, label="aggregate"
    )
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    return _chart(figure, alt)


def histogram(draws: Draws, normalized: Draws | None, alt: str) -> EmbeddedImage:
    """Draw the densities of draws within `EDGES` beside the standard normal density."""
    figure, axes = _axes("latent", "density")
    edges = EDGES.numpy()
    for of, colour, label in ((draws, _OURS, "as they are"), (normalized, _SECOND, "normalised by the statistics")):
        if of is not None:
            counts = of.counts.numpy()
            axes.stairs(counts[1:-1] / counts.sum() / np.diff(edges), edges, color=colour, lw=1.4, label=label)
    x = np.linspace(edges[0], edges[-1], 241)
    axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color=_NORMAL, lw=1.2, ls="--", label="N(0, 1)")
    axes.set_xlim(edges[0], edges[-1])
    axes.legend(fontsize=8, frameon=False)
    return _chart(figure, alt)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes: Any = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(x)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, axis="y", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    return figure, axes
