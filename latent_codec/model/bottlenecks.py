"""Turn features into a posterior: a diagonal Gaussian or none; `model/codebooks.py` has the quantised ones."""

from typing import Any, Protocol

import torch
from torch import nn

from latent_codec.model.codebooks import FiniteScalarQuantizer, VectorQuantizer
from latent_codec.model.config import DiagonalGaussianConfig, IdentityConfig
from latent_codec.precision import float32_island


class Posterior(Protocol):
    """q(z given x), whatever its kind. All floats are float32 whatever autocast does around it."""

    clamped: torch.Tensor
    """Share of the log-variances that a clamp changed, a scalar; 0 where there are none."""

    @property
    def mean(self) -> torch.Tensor:
        """(b, z, h, w)."""
        ...

    @property
    def coded(self) -> torch.Tensor:
        """What a bitstream holds: the mean, or of a codebook the indices (b, 1, h, w) int64."""
        ...

    def sample(self, noise: torch.Generator | torch.Tensor) -> torch.Tensor:
        """Latents (b, z, h, w)."""
        ...

    def mode(self) -> torch.Tensor:
        """The most likely latents, (b, z, h, w)."""
        ...

    def kl_map(self) -> torch.Tensor:
        """What the ELBO charges for the latents in nats, (b, channels, h, w)."""
        ...

    def kl(self) -> torch.Tensor:
        """Its sum for each image, (b,)."""
        ...

    def cpu(self) -> "Posterior": ...


class DiagonalGaussian:
    """q(z given x) = N(mean, exp(logvar)), independent per element; float32 whatever autocast does around it.

    mean, logvar: (b, z, h, w) float32; logvar has been clamped already. `clamped` is the share of logvars that the
    clamp changed, a scalar tensor.
    """

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor, clamped: torch.Tensor | None = None) -> None:
        self.mean = mean
        self.logvar = logvar
        self.clamped = torch.zeros((), device=mean.device) if clamped is None else clamped

    @property
    def coded(self) -> torch.Tensor:
        return self.mean

    @property
    def std(self) -> torch.Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: torch.Generator | torch.Tensor) -> torch.Tensor:
        """mean + std * noise, (b, z, h, w) float32 (Kingma & Welling 2014, eq. 4).

        `noise` is a generator on the posterior's device, or standard normal noise of the posterior's shape.
        """
        if not isinstance(noise, torch.Tensor):
            noise = torch.randn(self.mean.shape, generator=noise, device=self.mean.device)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the posterior {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean.dtype)

    def mode(self) -> torch.Tensor:
        """The most likely latent, (b, z, h, w) float32."""
        return self.mean

    def log_ratio(self, z: torch.Tensor) -> torch.Tensor:
        """log N(z; 0, I) - log q(z given x) in nats per image, (..., b) float32, of latents (..., b, z, h, w).

        Its expectation under q is minus the KL.
        """
        with float32_island(z):
            deviation = (z.float() - self.mean) / self.std
            return 0.5 * (deviation.square() + self.logvar - z.float().square()).flatten(-3).sum(-1)

    def kl_map(self) -> torch.Tensor:
        """KL(q || N(0, I)) of each element in nats, (b, z, h, w): Kingma & Welling (2014), appendix B."""
        with float32_island(self.mean):
            # expm1(v) - v loses far less than exp(v) - 1 - v where the posterior is close to the prior.
            return 0.5 * (self.mean.square() + torch.expm1(self.logvar) - self.logvar)

    def kl(self) -> torch.Tensor:
        """KL(q || N(0, I)) in nats per image, (b,) float32."""
        return self.kl_map().flatten(1).sum(1)

    def cpu(self) -> "DiagonalGaussian":
        return DiagonalGaussian(self.mean.cpu(), self.logvar.cpu(), self.clamped.cpu())


class DiagonalGaussianBottleneck(nn.Module):
    """Mean and log-variance from features, with the one clamp on logvar of the whole library."""

    features_per_latent = 2

    def __init__(self, config: DiagonalGaussianConfig, latent_channels: int) -> None:
        super().__init__()
        if not config.logvar_min < config.logvar_max:
            raise ValueError(f"logvar_min {config.logvar_min} must be below logvar_max {config.logvar_max}")
        self.config = config

    def forward(self, features: torch.Tensor) -> DiagonalGaussian:
        """features: (b, 2z, h, w), means first, as AutoencoderKL orders them."""
        with float32_island(features):
            mean, raw = features.float().chunk(2, dim=1)  # (b, z, h, w) each
            logvar = raw.clamp(self.config.logvar_min, self.config.logvar_max)
            return DiagonalGaussian(mean, logvar, (raw.detach() != logvar.detach()).float().mean())


class Identity:
    """All mass on one latent: what the encoder says, (b, z, h, w) float32. Nothing is charged for it."""

    def __init__(self, mean: torch.Tensor) -> None:
        self.mean = mean
        self.clamped = torch.zeros((), device=mean.device)

    @property
    def coded(self) -> torch.Tensor:
        return self.mean

    def sample(self, noise: torch.Generator | torch.Tensor) -> torch.Tensor:
        """The mode: there is nothing to draw."""
        return self.mean

    def mode(self) -> torch.Tensor:
        return self.mean

    def kl_map(self) -> torch.Tensor:
        """Zeros: a point has no finite KL against a density, and an autoencoder charges none."""
        return torch.zeros_like(self.mean)

    def kl(self) -> torch.Tensor:
        return self.kl_map().flatten(1).sum(1)

    def cpu(self) -> "Identity":
        return Identity(self.mean.cpu())


class IdentityBottleneck(nn.Module):
    """Latents are the features."""

    features_per_latent = 1

    def __init__(self, config: IdentityConfig, latent_channels: int) -> None:
        super().__init__()

    def forward(self, features: torch.Tensor) -> Identity:
        """features: (b, z, h, w)."""
        return Identity(features.float())


BOTTLENECKS: dict[str, Any] = {
    "gaussian": DiagonalGaussianBottleneck,
    "identity": IdentityBottleneck,
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
}
"""Each takes its config and the number of latent channels z."""
