"""Encode all images once, and summarise the posteriors by channel and together."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from latent_codec.images.geometry import pad
from latent_codec.images.sources import Source
from latent_codec.inference.calibration import Moments
from latent_codec.inference.runner import Runner
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key

EDGES = torch.linspace(-6, 6, 97, dtype=torch.float64)
"""Edges of the histogram's bins; values beyond them are in the first and the last count."""


class Draws(NamedTuple):
    """Summarise one draw of every latent element, all channels pooled."""

    counts: torch.Tensor  # (98,) int64, of values below, within and above `EDGES`
    mean: float
    variance: float
    skewness: float  # 0 for a Gaussian
    excess_kurtosis: float  # 0 for a Gaussian


class Survey(NamedTuple):
    """Hold moments per channel over images and positions, (z,) float64, and the draws."""

    images: int
    elements: int
    """Number of elements of one channel, over all images."""
    mean: torch.Tensor  # of the posterior means
    variance: torch.Tensor  # of the posterior means: how active the channel is
    posterior_variance: torch.Tensor  # mean of the posteriors' own variances; 0 where they are points
    kl: torch.Tensor  # nats per latent element, of Gaussian posteriors
    draws: Draws
    normalized: Draws | None
    """Draws normalised by the model's statistics, as a diffusion model sees them; None without statistics."""
    codes: torch.Tensor | None  # (K,) int64, how often each code of a codebook was taken

    @property
    def std(self) -> torch.Tensor:
        """Return the standard deviation of a draw over images, positions and noise (of the aggregate posterior)."""
        return (self.variance + self.posterior_variance).sqrt()

    @property
    def by_activity(self) -> list[int]:
        """Return the channels, the most active first."""
        return torch.argsort(self.variance, descending=True, stable=True).tolist()


def survey(runner: Runner, sources: Sequence[Source], seed: int, *, quiet: bool) -> Survey:
    """Encode every image; `seed` and the image's name decide its draw. Raises `UserError` for an unreadable image."""
    codec = runner.codec
    moments, draws, scaled, statistics = Moments(codec), _Pooled(), _Pooled(), codec.statistics
    kl = torch.zeros(codec.config.latent_channels, dtype=torch.float64)
    for source in tqdm(sources, "posteriors", unit="image", disable=quiet or None):
        posterior = runner.encode([pad(source.read().pixels, codec.factor)], codec.class_numbers([source.label]))
        moments.add(posterior)
        z = posterior.sample(normal(image_key(seed, source.name)[None], tuple(posterior.mean.shape[1:])))
        draws.add(z)
        if isinstance(posterior, DiagonalGaussian):
            kl += posterior.kl_map()[0].double().sum((1, 2))
        if statistics is not None:
            shift, scale = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
            scaled.add((z - shift) / scale)
    normalized = None if statistics is None else scaled.result()
    codes = None if codec.config.codes is None else moments.taken
    kl /= moments.positions
    return Survey(len(sources), moments.positions, *moments.averages(), kl, draws.result(), normalized, codes)


def image_key(seed: int, name: str) -> torch.Tensor:
    """Return the key of an image's noise, int64 of shape ()."""
    return fold(seed, text_key(name))


class _Pooled:
    def __init__(self) -> None:
        self._counts = torch.zeros(len(EDGES) + 1, dtype=torch.int64)
        self._powers, self._count = torch.zeros(4, dtype=torch.float64), 0

    def add(self, z: torch.Tensor) -> None:
        z = z.flatten().double()
        self._counts += torch.bincount(torch.bucketize(z, EDGES), minlength=len(self._counts))
        self._powers += torch.stack([z.pow(i).sum() for i in range(1, 5)])
        self._count += len(z)

    def result(self) -> Draws:
        m, square, cube, fourth = (self._powers / self._count).tolist()  # means of z, z^2, z^3 and z^4
        variance = square - m**2
        skewness = (cube - 3 * m * square + 2 * m**3) / max(variance, 1e-30) ** 1.5
        kurtosis = (fourth - 4 * m * cube + 6 * m**2 * square - 3 * m**4) / max(variance, 1e-30) ** 2
        return Draws(self._counts, m, variance, skewness, kurtosis - 3)
