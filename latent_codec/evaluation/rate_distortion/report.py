"""Summarise rate-distortion measurements: means over images and comparisons of curves, as JSON and as a table."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latent_codec.evaluation.evaluate import PROTOCOL, mean_defined
from latent_codec.evaluation.rate_distortion.anchors import Anchor
from latent_codec.metrics.bjontegaard import LEAST_OVERLAP, METHOD, SCALES, Curve, Delta, delta_rate

REFINED = "refined"
"""Codec name of the rows of our best prior's files that were refined."""

RATES = tuple(i / 100 for i in range(25, 85, 5))
"""Bits per pixel at which quality is compared."""

RD_PROTOCOL = {
    "bpp": "all bytes of the file in bits over the image's own pixels; mean over images of each image's value",
    "ideal_bpp": "code length of the quantised latents under the prior, in bits over the image's own pixels; no file "
    "has this size: header, checksums and what the coder loses are missing",
    "kl_bpp": "KL of the image's posterior against N(0, I) in bits over its own pixels; depends on no step and no "
    "prior, and no file has this size",
    "decoded": "each file decoded again from its bytes, rounded and clipped to uint8, grey where the image is, against "
    "the image as read (upright sRGB)",
    "psnr": PROTOCOL["psnr"],
    "ms_ssim": PROTOCOL["ms_ssim"],
    "step": "quantiser step in units in which an error uniform over a step has the posterior's variance; the mean is "
    "rounded, or where a row says so quantised with subtractive dither",
    "delta_rate": f"Bjontegaard's delta rate in percent by bjontegaard's bd_rate, method {METHOD}, over the qualities "
    "that both curves of means reach: how much less (below 0) or more our best prior's rounded rows need at equal "
    f"quality; points that a cheaper one equals or beats are left out; no value below {LEAST_OVERLAP:.0%} overlap",
    "psnr_gain": f"difference of PSNR in dB at equal rate, {METHOD} over the rate's logarithm through the means",
}


class CodecSetting(NamedTuple):
    """Name a setting: a quantiser step of one of our priors, or an anchor's quality."""

    codec: str
    unit: str
    value: float
    dithered: bool

    def __str__(self) -> str:
        return f"{self.unit} {self.value:g}{', dithered' if self.dithered else ''}"


class RatePoint(NamedTuple):
    """Hold rate and distortion of one file at a setting, or their means over images."""

    setting: CodecSetting
    bpp: float
    ideal_bpp: float | None
    distortion: dict[str, float | None]
    """Values by metric; None where a metric is undefined."""
    bytes: int | None = None
    """Size of the file; None of means."""

    def json(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        size = {} if self.bytes is None else {"bytes": self.bytes}
        return self.setting._asdict() | size | {"bpp": self.bpp, "ideal_bpp": self.ideal_bpp} | self.distortion

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "RatePoint":
        """Return the point that `json` made the values of."""
        rest = dict(found)
        setting = CodecSetting(*(rest.pop(name) for name in CodecSetting._fields))
        return cls(setting, rest.pop("bpp"), rest.pop("ideal_bpp"), rest)


class ImageRates(NamedTuple):
    """Hold all files of one image."""

    path: str
    pixels: int
    kl_bpp: float
    rows: list[RatePoint]

    def json(self) -> dict[str, Any]:
        """Return the rows as JSON values."""
        return self._asdict() | {"rows": [row.json() for row in self.rows]}


class AnchorComparison(NamedTuple):
    """Compare our curve with an anchor's."""

    anchor: str
    delta_rates: dict[str, Delta]
    """Delta rates by metric."""
    psnr_gains: list[tuple[float, float | None]]
    """(bits per pixel, dB) at `RATES`; None where one of the curves does not reach."""

    def json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        rates = {metric: delta._asdict() for metric, delta in self.delta_rates.items()}
        gains = [{"bpp": rate, "db": gain} for rate, gain in self.psnr_gains]
        return {"delta_rates": rates, "psnr_gains": gains}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateDistortionReport:
    """Hold what `rate_distortion` measured, as rd.json has it."""

    about: dict[str, Any]
    protocol: dict[str, str]
    settings: dict[str, str]
    """Settings in words, by codec."""
    notes: list[str]
    images: list[ImageRates]
    failures: dict[str, str]

    @cached_property
    def points(self) -> list[RatePoint]:
        """Return the means over images of every setting, our best prior first."""
        return mean_points(self.images)

    @property
    def kl_bpp(self) -> float:
        """Return the mean over images of the posterior's KL in bits per pixel."""
        return float(np.mean([image.kl_bpp for image in self.images]))

    @cached_property
    def against(self) -> list[AnchorComparison]:
        """Return the comparisons of our best prior with each anchor."""
        return self._comparisons(self.codecs[0])

    @cached_property
    def refined_against(self) -> list[AnchorComparison]:
        """Return the comparisons of the refined files, if there are any."""
        return self._comparisons(REFINED) if REFINED in self.codecs else []

    def _comparisons(self, ours: str) -> list[AnchorComparison]:
        anchors = dict.fromkeys(p.setting.codec for p in self.points if p.setting.unit == "quality")
        return [compare_curves(self.points, ours, anchor) for anchor in anchors]

    @property
    def codecs(self) -> list[str]:
        """Return the codecs' names, our best prior first."""
        return list(dict.fromkeys(point.setting.codec for point in self.points))

    def curve_points(self, codec: str) -> list[RatePoint]:
        """Return the points of one codec without dither."""
        return curve_points(self.points, codec)

    def json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "about": self.about,
            "protocol": self.protocol,
            "settings": self.settings,
            "notes": self.notes,
            "summary": {"kl_bpp": self.kl_bpp, "points": [point.json() for point in self.points]},
            "against": {comparison.anchor: comparison.json() for comparison in self.against},
            "refined_against": {comparison.anchor: comparison.json() for comparison in self.refined_against},
            "images": [image.json() for image in self.images],
            "failures": self.failures,
        }

    def table(self) -> str:
        """Return points, comparisons and definitions as lines of text."""
        loader = FileSystemLoader(Path(__file__).parent)
        environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        return environment.get_template("table.txt.jinja").render(report=self, refined=REFINED).rstrip()

    def dithered_and_rounded(self) -> Iterator[tuple[RatePoint, RatePoint]]:
        """Yield each point with dither, beside the rounded one at the same step."""
        for dithered in (point for point in self.points if point.setting.dithered):
            for rounded in self.curve_points(dithered.setting.codec):
                if rounded.setting.value == dithered.setting.value:
                    yield dithered, rounded


def curve_points(points: Sequence[RatePoint], codec: str) -> list[RatePoint]:
    """Return the points of one codec without dither."""
    return [point for point in points if point.setting.codec == codec and not point.setting.dithered]


def rate_curve(points: Sequence[RatePoint], codec: str, metric: str) -> Curve:
    """Return one codec's curve in one metric."""
    own = curve_points(points, codec)
    return Curve.of([point.bpp for point in own], [point.distortion[metric] for point in own], SCALES[metric])


def mean_points(images: Sequence[ImageRates]) -> list[RatePoint]:
    """Average rows over images, which hold the same settings in the same order; undefined values do not count."""
    means = []
    for rows in zip(*(image.rows for image in images), strict=True):
        ideal = mean_defined([row.ideal_bpp for row in rows])
        distortion = {name: mean_defined([row.distortion[name] for row in rows]) for name in rows[0].distortion}
        means.append(RatePoint(rows[0].setting, float(np.mean([row.bpp for row in rows])), ideal, distortion))
    return means


def compare_curves(points: Sequence[RatePoint], ours: str, anchor: str) -> AnchorComparison:
    """Compare the curves of one of our codecs and of an anchor in every metric that was measured."""
    names = [name for name in SCALES if name in points[0].distortion]
    tested, other = ({name: rate_curve(points, codec, name) for name in names} for codec in (ours, anchor))
    gains: list[tuple[float, float | None]] = []
    for rate in RATES:
        mine, theirs = tested["psnr"].at(rate), other["psnr"].at(rate)
        gains.append((rate, None if mine is None or theirs is None else mine - theirs))
    return AnchorComparison(anchor, {name: delta_rate(other[name], tested[name]) for name in names}, gains)


def codec_settings(stream_ids: dict[str, str], refine: int, anchors: Sequence[Anchor]) -> dict[str, str]:
    """Return the settings of our codecs and of the anchors in words."""
    best = next(iter(stream_ids))
    refined = {REFINED: f"files of the {best} prior after {refine} rounds of `encode --refine`"} if refine else {}
    ours = {f"{kind} (ours)": f"stream id {name}" for kind, name in stream_ids.items()}
    return ours | refined | {anchor.name: anchor.settings() for anchor in anchors}


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that rates depend on."""
    return {name: importlib.metadata.version(name) for name in ("bjontegaard", "constriction", "pillow")}
