"""Render the page of results from its templates."""

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latent_codec.evaluation.rate_distortion.plot import svg
from latent_codec.evaluation.rate_distortion.report import REFINED, RatePoint, curve_points
from latent_codec.evaluation.report.page import METRICS
from latent_codec.model.codec import Codec
from tools.results import costs
from tools.results.costs import Costs
from tools.results.published import STAGES, against, published_curves

PAGE, PLOT, SHEET = "results.md", "results.svg", "results.jpg"

_PCA = {
    "ppca32": ("probabilistic PCA at photo's first sigma", 32),
    "pca32": ("PCA of 8x8 patches", 32),
    "pca16": ("PCA of 8x8 patches", 16),
}
"""Words and channels of the models of the quality file that are not networks."""


class Measured(NamedTuple):
    """Hold the contents of the JSON files of a model's measurements."""

    rd: dict[str, Any]
    quality: dict[str, Any]
    crops: dict[str, Any]


def _points(measured: Measured) -> list[RatePoint]:
    """Return the means over images of all settings, our best prior first."""
    return [RatePoint.from_json(point) for point in measured.rd["summary"]["points"]]


def plot(measured: Measured) -> str:
    """Return the SVG of the measured and published curves."""
    about = measured.rd["about"]
    return svg(_points(measured), about, "photo", {curve.name: curve.points for curve in published_curves(about)})


def page(measured: Measured, codec: Codec) -> str:
    """Return the Markdown; figures come from the JSON files and, of costs, from the networks' shapes."""
    rd, points = measured.rd, _points(measured)
    best = points[0].setting.codec
    curves, ours = published_curves(rd["about"]), curve_points(points, best)
    deltas = against(curves, points, best)
    percents = {name: found["delta_rates"].get("psnr", {}).get("percent") for name, found in rd["against"].items()}
    training = codec.provenance.get("training", {})
    fields = {
        "rd": rd,
        "quality": measured.quality,
        "crops": measured.crops,
        "codec": codec,
        "plot": PLOT,
        "sheet": SHEET,
        "metrics": {n: words for n, words in METRICS.items() if any(p.distortion.get(n) is not None for p in points)},
        "points": points,
        "ours": ours,
        "one": min(ours, key=lambda point: abs(point.setting.value - 1)),
        "refined": {point.setting.value: point for point in curve_points(points, REFINED)},
        "factorized": {point.setting.value: point for point in curve_points(points, "factorized")},
        "curves": curves,
        "deltas": deltas,
        "refined_deltas": against(curves, points, REFINED),
        "percents": percents | {curve.name: delta.percent for curve, delta in zip(curves, deltas, strict=True)},
        "measured_stages": [_measured_stage(n, found, codec) for n, found in measured.quality["results"].items()],
        "published_stages": [(s, costs.of_sd_shape(s.channels) if s.sd_shape else None) for s in STAGES],
        "side": costs.SIDE,
        "own_cost": costs.of_config(codec.config),
        "sd_cost": costs.of_sd_shape(4),
        "training": training,
        "objective": training.get("config", {}).get("objective", {}),
    }
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.md.jinja").render(fields).rstrip() + "\n"


def _measured_stage(name: str, found: dict[str, Any], codec: Codec) -> tuple[str, dict[str, Any], Costs | None]:
    """Return a measured model's name on the page, what was measured, and its costs."""
    if found.get("model_id") == codec.model_id:
        return f"**{name}**", found, costs.of_config(codec.config)
    if name in _PCA:
        words, channels = _PCA[name]
        return words, found, costs.of_pca(channels)
    if name == "TAEF2":
        return "TAEF2 (another project's, not a VAE)", found, costs.of_taef2()
    return name, found, None
