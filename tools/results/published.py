"""Load what others published of their codecs and autoencoders, with its source, and compare our curves with theirs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_codec.evaluation.rate_distortion.report import RatePoint, curve_points, rate_curve
from latent_codec.metrics.bjontegaard import SCALES, Curve, Delta, delta_rate

PUBLISHED_OVERLAP = 0.25
"""Share of our range that a published curve must cover; they begin at higher qualities than ours."""


class PublishedCurve(NamedTuple):
    """Hold a codec's curve on Kodak's 24 images of 768x512: PSNR of RGB in dB, mean over images."""

    name: str
    source: str
    points: list[tuple[float, float]]
    """(bits per pixel, PSNR), by ascending rate."""


class PublishedStage(NamedTuple):
    """Hold the quality of a diffusion model's autoencoder as its authors measured it."""

    name: str
    factor: int
    channels: int
    set: str
    psnr: float
    ssim: float
    lpips: float
    sd_shape: bool
    """True if its networks are Stable Diffusion's except for the latents' channels, so that `costs` can count them."""


_FOUND: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name("published.json").read_text())

CURVES = [PublishedCurve(**curve) for curve in _FOUND["curves"]]
STAGES = [PublishedStage(**stage) for stage in _FOUND["stages"]]


def published_curves(about: dict[str, Any]) -> list[PublishedCurve]:
    """Return the published curves of the measured set: those of Kodak, or none."""
    return CURVES if about["set"].lower() == "kodak" and about["images"] == 24 else []


def against(curves: Sequence[PublishedCurve], points: Sequence[RatePoint], codec: str) -> list[Delta]:
    """Return the delta rates in PSNR of one of our kinds of files, if there are any, against published curves."""
    if not curve_points(points, codec):
        return []
    ours = rate_curve(points, codec, "psnr")
    theirs = (Curve.of([x for x, _ in c.points], [y for _, y in c.points], SCALES["psnr"]) for c in curves)
    return [delta_rate(curve, ours, PUBLISHED_OVERLAP) for curve in theirs]
