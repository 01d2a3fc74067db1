"""Features -> posterior. The diagonal Gaussian is the only one so far."""

import torch
from torch import nn

from latent_codec.config import DiagonalGaussianConfig
from latent_codec.precision import float32_island


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


class DiagonalGaussianBottleneck(nn.Module):
    """Mean and log-variance from features, with the one clamp on logvar of the whole library."""

    features_per_latent = 2

    def __init__(self, config: DiagonalGaussianConfig) -> None:
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


BOTTLENECKS = {"gaussian": DiagonalGaussianBottleneck}
