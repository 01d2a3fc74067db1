"""Represent the approximate posterior q(z|x): its samples, its mode and its KL divergence from the prior.

The KL of the ELBO is here: `DiagonalGaussian.kl_map` for Gaussian latents, `Codes.kl_map` (model/codebooks.py) for
discrete ones. Every float is float32, under autocast too.
"""

import abc
import copy
from typing import Self

import torch

from latent_codec.precision import float32_island


class Posterior(abc.ABC):
    """Represents the distribution of latents (b, z, h, w) given an image; this base is a point mass at `mean`."""

    def __init__(self, mean: torch.Tensor, clamped: torch.Tensor | None = None) -> None:
        """`mean` is (b, z, h, w); `clamped` is the share of the log-variances that a clamp changed, a scalar."""
        self.mean = mean
        self.clamped = torch.zeros((), device=mean.device) if clamped is None else clamped

    @property
    def coded(self) -> torch.Tensor:
        """Return what a bitstream stores: the mean (b, z, h, w), or a codebook's indices (b, 1, h, w) int64."""
        return self.mean

    def sample(self, noise: torch.Generator | torch.Tensor) -> torch.Tensor:
        """Draw latents (b, z, h, w); a point mass returns its mode."""
        return self.mean

    def mode(self) -> torch.Tensor:
        """Return the most likely latents, (b, z, h, w)."""
        return self.mean

    @abc.abstractmethod
    def kl_map(self) -> torch.Tensor:
        """Return the KL divergence from the prior of each latent element in nats, (b, channels, h, w)."""

    def kl(self) -> torch.Tensor:
        """Return the KL divergence of each image in nats, (b,)."""
        return self.kl_map().flatten(1).sum(1)

    def cpu(self) -> Self:
        """Return a copy in the CPU's memory."""
        other = copy.copy(self)
        vars(other).update({name: value.cpu() for name, value in vars(self).items() if isinstance(value, torch.Tensor)})
        return other


class DiagonalGaussian(Posterior):
    """Represents the posterior N(mean, exp(logvar)) with independent elements. mean, logvar: (b, z, h, w) float32;
    logvar has been clamped already. clamped: see `Posterior`."""

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor, clamped: torch.Tensor | None = None) -> None:
        super().__init__(mean, clamped)
        self.logvar = logvar

    @property
    def std(self) -> torch.Tensor:
        """Return the standard deviation, (b, z, h, w)."""
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: torch.Generator | torch.Tensor) -> torch.Tensor:
        """Return mean + std * noise, (b, z, h, w) float32 (Kingma & Welling 2014, eq. 4), for a generator on the
        posterior's device or standard normal noise of its shape; another shape raises `ValueError`."""
        if not isinstance(noise, torch.Tensor):
            noise = torch.randn(self.mean.shape, generator=noise, device=self.mean.device)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the posterior {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_ratio(self, z: torch.Tensor) -> torch.Tensor:
        """Return log N(z; 0, I) - log q(z|x) in nats per image, (..., b), of latents (..., b, z, h, w).
        Its expectation under q is minus the KL divergence."""
        with float32_island(z):
            deviation = (z.float() - self.mean) / self.std
            return 0.5 * (deviation.square() + self.logvar - z.float().square()).flatten(-3).sum(-1)

    def kl_map(self) -> torch.Tensor:
        """Return KL(q || N(0, I)) of each element in nats, (b, z, h, w): Kingma & Welling (2014), appendix B."""
        with float32_island(self.mean):
            # expm1(v) - v loses far less than exp(v) - 1 - v where the posterior is close to the prior.
            return 0.5 * (self.mean.square() + torch.expm1(self.logvar) - self.logvar)


class Identity(Posterior):
    """Represents the point mass of a deterministic autoencoder, which pays no KL."""

    def kl_map(self) -> torch.Tensor:
        """Return zeros: a point mass has no finite KL from a density, and an autoencoder charges none."""
        return torch.zeros_like(self.mean)
