"""Measure how likely the model finds images: ELBO, IWAE bound and, of discrete likelihoods, bits per dimension."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from latent_codec.evaluation.bounds import bounds
from latent_codec.evaluation.report.page import NOT_GAUSSIAN, Number, Section, is_gaussian, left_out
from latent_codec.evaluation.report.pictures import SIDE, Shown, shown_side
from latent_codec.evaluation.report.survey import image_key
from latent_codec.images.geometry import in_channels, pad
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.model.config import BernoulliConfig, GaussianConfig

NAME, TITLE = "bounds", "ELBO and IWAE bound"


class ImageBound(NamedTuple):
    """Hold the bounds of one image in nats."""

    image: str
    dimensions: int
    """Height x width x channels as the network sees them."""
    elbo: float
    iwae: float
    effective_samples: float


def likelihood_bounds(runner: Runner, images: Sequence[Shown], seed: int, samples: int, *, quiet: bool) -> Section:
    """Bound the log-likelihood of images by `samples` importance samples each."""
    if not is_gaussian(runner.codec):
        return left_out(NAME, TITLE, NOT_GAUSSIAN)
    found = [_bound(runner, image, seed, samples) for image in tqdm(images, "bounds", disable=quiet or None)]
    over = (
        f"mean over {len(images)} images spread evenly over the set, of each the middle of up to "
        f"{shown_side(runner.codec)} pixels a side; {samples} draws each from the posterior, seed {seed}"
    )
    labels = {"elbo": "ELBO", "iwae": f"IWAE bound, k = {samples}"}
    how = {
        "elbo": "log p(x given z) averaged, less the KL in closed form (Kingma & Welling 2014, eq. 7)",
        "iwae": "log of the average importance weight (Burda et al. 2016, eq. 8)",
    }
    numbers = [
        Number(name, label, fmean(getattr(b, name) for b in found), "nats per image", f"{how[name]}; {over}")
        for name, label in labels.items()
    ]
    effective = (
        "(sum of weights)^2 / sum of their squares (Kong et al. 1994); near 1, more samples would raise the bound"
    )
    mean = fmean(b.effective_samples for b in found)
    numbers.append(Number("effective_samples", "effective samples", mean, f"of {samples}", effective))
    if not isinstance(runner.codec.config.likelihood, GaussianConfig):
        for name, label in labels.items():
            rate = -fmean(getattr(b, name) / b.dimensions for b in found) / math.log(2)
            protocol = f"-({label}) over an image's height x width x channels as the network sees it; {over}"
            numbers.append(Number(f"{name}_bits_per_dim", f"bits per dimension by the {label}", rate, "", protocol))
    records = {"images": [bound._asdict() for bound in found]}
    return Section(NAME, TITLE, {"meaning": _meaning(runner.codec)}, numbers, records)


def _bound(runner: Runner, image: Shown, seed: int, samples: int) -> ImageBound:
    codec = runner.codec
    device = next(codec.parameters()).device
    x = in_channels(pad(image.pixels, codec.factor), codec.config.image_channels)[None].to(device)  # (1, c, h, w)
    at_once = max(1, runner.options.batch_size * SIDE**2 // x[0, 0].numel())
    labels, key = codec.class_numbers([image.label]).to(device), image_key(seed, image.name)[None]
    with runner.autocast():
        found = bounds(codec, x, key, samples, at_once=at_once, labels=labels)
    return ImageBound(image.name, x.numel(), found.elbo.item(), found.iwae.item(), found.effective_samples.item())


def _meaning(codec: Codec) -> str:
    """Explain what a value says under this likelihood."""
    match codec.config.likelihood:
        case GaussianConfig():
            return (
                "The likelihood is a density: its logarithm has either sign, depends on the likelihood's sigma and is "
                "no code length, so there are no bits per dimension, and other likelihoods' bounds are not comparable."
            )
        case BernoulliConfig(pixels=pixels):
            drawn = "1 with probability v / 255, drawn once by seed and name"
            how = "1 from 128 up" if pixels == "threshold" else drawn
            return f"Bits per dimension are of pixels that are 0 or 1 (an 8-bit value v is {how}), not of 8-bit pixels."
        case _:
            return "Bits per dimension are of 8-bit pixels: comparable between all models of them."
