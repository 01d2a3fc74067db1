"""Load what others published of their codecs and autoencoders, with its source; nothing is measured here."""

import json
from pathlib import Path
from typing import Any, NamedTuple


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
