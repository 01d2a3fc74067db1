"""Turn the encoder's features into a posterior, and register the ways to do so by the `kind` of their config.

To add one: (1) write its config dataclass in `model/config.py` and name it in `BottleneckConfig`; (2) write a module
class that fulfils `Bottleneck`, and its `Posterior` if none fits; (3) add a line to `BOTTLENECKS`.
"""

from typing import Any, Protocol

import torch
from torch import nn

from latent_codec.model.codebooks import FiniteScalarQuantizer, VectorQuantizer
from latent_codec.model.config import DiagonalGaussianConfig, IdentityConfig
from latent_codec.model.posteriors import DiagonalGaussian, Identity, Posterior
from latent_codec.precision import float32_island


class Bottleneck(Protocol):
    """Describes a module that makes the posterior of features (b, features, h, w)."""

    features: int
    """Channels that it takes."""

    def __init__(self, config: Any, latent_channels: int) -> None: ...

    def __call__(self, features: torch.Tensor) -> Posterior: ...


class DiagonalGaussianBottleneck(nn.Module):
    """Splits features (b, 2z, h, w) into mean and log-variance, and clamps the latter: the library's only clamp.
    With `logvar_channels` of n, features are (b, z + n, h, w), and `logvar` (z - n,) holds the other channels'."""

    def __init__(self, config: DiagonalGaussianConfig, latent_channels: int) -> None:
        super().__init__()
        if not config.logvar_min < config.logvar_max:
            raise ValueError(f"logvar_min {config.logvar_min} must be below logvar_max {config.logvar_max}")
        n = latent_channels if config.logvar_channels is None else config.logvar_channels
        if not 0 <= n <= latent_channels:
            raise ValueError(f"logvar_channels {n} must be from 0 to the {latent_channels} latent channels")
        self.config, self.features = config, latent_channels + n
        self.logvar = nn.Parameter(torch.zeros(latent_channels - n)) if n < latent_channels else None

    def forward(self, features: torch.Tensor) -> DiagonalGaussian:
        """Return the posterior of features with the means first, as AutoencoderKL orders them."""
        with float32_island(features):
            own = 0 if self.logvar is None else len(self.logvar)
            mean, raw = features.float().tensor_split([(features.shape[1] + own) // 2], dim=1)  # (b, z or n, h, w)
            if self.logvar is not None:
                raw = torch.cat([raw, self.logvar.float()[:, None, None].expand(len(raw), -1, *raw.shape[2:])], 1)
            logvar = raw.clamp(self.config.logvar_min, self.config.logvar_max)
            return DiagonalGaussian(mean, logvar, (raw.detach() != logvar.detach()).float().mean())


class IdentityBottleneck(nn.Module):
    """Takes features (b, z, h, w) as the latents."""

    def __init__(self, config: IdentityConfig, latent_channels: int) -> None:
        super().__init__()
        self.features = latent_channels

    def forward(self, features: torch.Tensor) -> Identity:
        return Identity(features.float())


BOTTLENECKS: dict[str, type[Bottleneck]] = {
    "gaussian": DiagonalGaussianBottleneck,
    "identity": IdentityBottleneck,
    "vq": VectorQuantizer,
    "fsq": FiniteScalarQuantizer,
}
