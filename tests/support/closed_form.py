"""Make codecs small enough to be compared with theory, and images for their closed form."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, GaussianConfig, LinearConfig
from tests.support.networks import TINY_LITE, config_of, make_codec
from train.data.crops import Batches, ImageSet, MemoryImages, SamplePlan
from train.init.closed_form import patch_moments, start_from_closed_form

PATCH, Z, SIGMA = 4, 6, 0.05
D = 3 * PATCH**2
PLAN = SamplePlan(seed=0, crop=16, flip=True, batch_size=8, micro_batches=1, rank=0, world=1)
STEPS = 6
LINEAR = config_of(LinearConfig(patch=PATCH), z=Z, likelihood=GaussianConfig(scale="fixed", sigma=SIGMA))
LITE = dataclasses.replace(LINEAR, backbone=dataclasses.replace(TINY_LITE, patch=PATCH, stem=2))


def smooth_images(folder: Path) -> Batches:
    """Write smooth Gaussian fields of unequal brightness in R, G and B, within the range of pixels."""
    random = np.random.default_rng(0)
    for i in range(6):
        field = random.normal(size=(32, 40, 3))
        for axis in (0, 1):
            field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / math.sqrt(3)
        field = np.clip(field * 35 + np.array([150, 128, 90]), 0, 255)
        Image.fromarray(np.rint(field).astype(np.uint8)).save(folder / f"{i}.png")
    sources = find_images(folder)
    images = ImageSet(sources=sources, labels=torch.zeros(len(sources)), channels=3)
    return MemoryImages(images, PLAN.crop, torch.device("cpu"), quiet=True)


def started(config: CodecConfig, images: Batches) -> Codec:
    codec = make_codec(config)
    start_from_closed_form(codec, patch_moments(images, PLAN, codec, STEPS, quiet=True))
    return codec


def crops(images: Batches) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in images.batches(PLAN, 0, STEPS)])


def noises(z: int) -> Iterator[torch.Tensor]:
    """Yield 2z points with mean 0 and covariance 1, which integrate a quadratic over the noise exactly."""
    for axis in torch.eye(z) * math.sqrt(z):
        yield from (axis, -axis)


@torch.no_grad()
def elbo(codec: Codec, images: Batches) -> float:
    """Return the ELBO in nats per patch, exact over the noise if the decoder is linear without overlap."""
    x = codec.likelihood.from_uint8(crops(images))
    posterior = codec.encode(x)
    noise = (e[:, None, None].expand_as(posterior.mean) for e in noises(codec.config.latent_channels))
    params = (codec.likelihood_params(posterior.sample(e)) for e in noise)
    log_probs = [codec.likelihood.log_prob(p, x).double() for p in params]
    total = torch.stack(log_probs).mean(0) - posterior.kl().double()
    return float(total.mean()) / (16 // PATCH) ** 2
