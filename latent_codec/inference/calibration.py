"""Measure a model's latent statistics, quantiser and factorised prior on images."""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from latent_codec.images.geometry import pad
from latent_codec.images.sources import Source, find_all
from latent_codec.inference import tiling
from latent_codec.metrics.distortion import psnr
from latent_codec.model.checks import check_channels
from latent_codec.model.codebooks import Codes
from latent_codec.model.codec import Codec
from latent_codec.model.file import LatentStatistics
from latent_codec.model.posteriors import DiagonalGaussian, Posterior
from latent_codec.prior import factorized
from latent_codec.prior.priors import Priors
from latent_codec.prior.quantizer import channel_steps_from_std

_KEPT_POSITIONS = 2**12  # per image, to count how often each quantised value occurs


@torch.inference_mode()
def calibrate(codec: Codec, sources: Iterable[Source], description: str, *, quiet: bool) -> None:
    """Set statistics, quantiser and factorised prior from images, named by `description`; raises as `Source.read`."""
    check_channels(codec)
    measured, kept, psnrs = Moments(codec), list[torch.Tensor](), list[torch.Tensor]()
    for source in tqdm(list(sources), "latent statistics", unit="image", disable=quiet or None):
        pixels = source.read().pixels
        labels = codec.class_numbers([source.label])
        posterior = tiling.encode(codec, pad(pixels, codec.factor)[None], tiling.default_tile(codec), labels)
        measured.add(posterior)
        if codec.config.prefixes:
            psnrs.append(_prefix_psnr(codec, posterior, pixels, labels))
        if measured.codes is None:
            mean = posterior.mean[0].flatten(1)  # (z, h * w)
            kept.append(mean[:, :: -(-mean.shape[1] // _KEPT_POSITIONS)].float())
    codec.statistics = measured.statistics(description)
    if psnrs:
        averages = tuple(torch.stack(psnrs).mean(0).tolist())
        codec.statistics = dataclasses.replace(codec.statistics, prefix_psnr=averages)
    codec.priors = measured.priors(codec.statistics, kept)


def _prefix_psnr(codec: Codec, posterior: Posterior, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB of one image's decoded mode with each of the model's prefixes, (prefixes,)."""
    found, size = [], pixels.shape[-2:]
    for channels in codec.config.prefixes:
        decoded = tiling.decode_uint8(codec, posterior.mode()[:, :channels], tiling.default_tile(codec), labels)
        found.append(psnr(decoded[..., : size[0], : size[1]], pixels[None]))
    return torch.cat(found)


class Moments:
    """Sum moments per channel over images and positions in float64, and count the codes of a codebook."""

    def __init__(self, codec: Codec) -> None:
        self.positions, self.images, self.codes = 0, 0, codec.config.codes
        self.total, self.square, self.variance = torch.zeros(3, codec.config.latent_channels, dtype=torch.float64)
        self.taken = torch.zeros(self.codes or 0, dtype=torch.int64)
        self.gaussian = True

    def add(self, posterior: Posterior) -> None:
        """Add the posterior of one image."""
        mean = posterior.mean[0].flatten(1).double()  # (z, h * w)
        self.total, self.square = self.total + mean.sum(1), self.square + mean.square().sum(1)
        self.gaussian = isinstance(posterior, DiagonalGaussian)
        if isinstance(posterior, DiagonalGaussian):
            self.variance = self.variance + posterior.logvar[0].flatten(1).double().exp().sum(1)
        if isinstance(posterior, Codes):
            self.taken += torch.bincount(posterior.indices.flatten(), minlength=posterior.codes)
        self.positions, self.images = self.positions + mean.shape[1], self.images + 1

    def averages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean and variance of the posterior means, and the mean of the posterior variances, (z,) float64."""
        mean = self.total / self.positions
        spread = (self.square / self.positions - mean.square()).clamp(min=0)  # rounding may go below 0
        return mean, spread, self.variance / self.positions

    def statistics(self, description: str) -> LatentStatistics:
        """Return the statistics of latents, drawn from the posteriors of the images that `description` names."""
        mean, spread, variance = self.averages()
        std = torch.sqrt(spread + variance)
        if not self.gaussian:
            std = std.clamp(min=1e-6)  # a channel that never changes can be scaled all the same
        return LatentStatistics(
            source=description,
            images=self.images,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            posterior_std=tuple(variance.sqrt().tolist()) if self.gaussian else None,
        )

    def priors(self, statistics: LatentStatistics, kept: list[torch.Tensor]) -> Priors:
        """Return the quantiser and the factorised prior of the codes, or else of the posterior means (z, n) kept."""
        if self.codes is not None:
            return Priors(np.ones(1, np.float32), factorized.fit_codes(self.taken.numpy()), None)
        of_posterior = None if statistics.posterior_std is None else np.array(statistics.posterior_std)
        channel_steps = channel_steps_from_std(np.array(statistics.std), of_posterior)
        return Priors(channel_steps, factorized.fit(torch.cat(kept, 1), channel_steps), None)


_ACTIVATION_IMAGES = 8


def calibration_images(codec: Codec, data: tuple[Path, ...], images: int) -> Iterator[torch.Tensor]:
    """Yield the first few of the images that `prepare` measures on, (1, 3, h, w) uint8, padded to the factor."""
    for source in find_all(data)[: min(images, _ACTIVATION_IMAGES)] if data else []:
        yield pad(source.read().pixels, codec.factor)[None]
