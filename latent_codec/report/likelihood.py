"""How likely the model finds images: ELBO, IWAE's bound and, of discrete likelihoods, bits per dimension."""

import math
from collections.abc import Sequence

import torch
from tqdm import tqdm

from latent_codec.bounds import bounds
from latent_codec.codec import Codec
from latent_codec.compute import Compute
from latent_codec.images import pad
from latent_codec.report.html import paragraphs
from latent_codec.report.page import NOT_GAUSSIAN, Number, Section, is_gaussian, left_out
from latent_codec.report.pictures import SIDE, Shown, shown_side
from latent_codec.report.survey import image_key

NAME, TITLE = "bounds", "ELBO and IWAE bound"

_DENSITIES = {"gaussian"}

_WORDS = {
    "gaussian": "The likelihood is a density: its logarithm can be of either sign, depends on the likelihood's sigma "
    "and is no code length, so there are no bits per dimension, and other likelihoods' bounds are not comparable.",
    "bernoulli": "Bits per dimension are of pixels that are 0 or 1 (uint8 from 128 up is 1), not of 8-bit pixels.",
    "discretized_logistic": "Bits per dimension are of 8-bit pixels: comparable between all models of them.",
}


def likelihood_bounds(
    codec: Codec, compute: Compute, images: Sequence[Shown], seed: int, samples: int, *, quiet: bool
) -> Section:
    """With `samples` importance samples for each of `images`."""
    if not is_gaussian(codec):
        return left_out(NAME, TITLE, NOT_GAUSSIAN)
    device = next(codec.parameters()).device
    elbo, iwae, effective, dimensions = [], [], [], []
    for name, pixels in tqdm(images, "bounds", unit="image", disable=quiet or None):
        x = pad(pixels, codec.factor)[None].to(device)  # (1, c, h, w)
        at_once = max(1, compute.batch_size * SIDE**2 // x[0, 0].numel())
        with compute.autocast():
            found = bounds(codec, x, image_key(seed, name)[None], samples, at_once=at_once)
        elbo.append(found.elbo.item())
        iwae.append(found.iwae.item())
        effective.append(found.effective_samples.item())
        dimensions.append(x.numel())
    of = (
        f"mean over {len(images)} images spread evenly over the set, of each the middle of up to "
        f"{shown_side(codec)} pixels a side; {samples} draws each from the posterior, seed {seed}"
    )
    pairs = (
        ("elbo", "ELBO", elbo, "log p(x given z) averaged, less the KL in closed form (Kingma & Welling 2014, eq. 7)"),
        ("iwae", f"IWAE bound, k = {samples}", iwae, "log of the average importance weight (Burda et al. 2016, eq. 8)"),
    )
    numbers = [Number(name, label, _mean(v), "nats per image", f"{words}; {of}") for name, label, v, words in pairs]
    numbers.append(
        Number(
            "effective_samples",
            "effective samples",
            _mean(effective),
            f"of {samples}",
            "(sum of weights)^2 / sum of their squares (Kong et al. 1994); near 1, more samples would raise the bound",
        )
    )
    kind = codec.config.likelihood.kind
    if kind not in _DENSITIES:
        for name, label, values, _ in pairs:
            rate = _mean([-v / d / math.log(2) for v, d in zip(values, dimensions, strict=True)])
            protocol = f"-{label} over an image's height x width x channels as the network sees it; {of}"
            numbers.append(Number(f"{name}_bits_per_dim", f"bits per dimension by the {label}", rate, "", protocol))
    records = [
        {"image": image.name, "dimensions": d, "elbo": e, "iwae": i, "effective_samples": n}
        for image, d, e, i, n in zip(images, dimensions, elbo, iwae, effective, strict=True)
    ]
    words = paragraphs(
        "Both are lower bounds of log p(x), in nats. " + _WORDS[kind],
    )
    return Section(NAME, TITLE, words, numbers, {"images": records})


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
