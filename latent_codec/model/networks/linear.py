"""A linear patch transform and its closed-form solution, probabilistic PCA."""

from typing import NamedTuple

import torch
from torch import nn

from latent_codec.model.config import LinearConfig
from latent_codec.precision import float32_island


class PatchMoments(NamedTuple):
    """Moments of image patches flattened as (channel, row, column), d = channels * patch^2.

    The mean is one value per channel: photographs have no preferred position, and a transposed convolution has one
    bias per channel. The covariance is taken around it.
    """

    mean: torch.Tensor  # (channels,) float64
    covariance: torch.Tensor  # (d, d) float64


class LinearBackbone(nn.Module):
    """Strided convolution in, its transpose out; a latent element sees one patch and `overlap` pixels around it.

    Both run in the precision of the weights whatever autocast does: strong components are known to a hundredth of
    their range, which bfloat16's 8 bits would drown.
    """

    def __init__(
        self,
        config: LinearConfig,
        image_channels: int,
        latent_channels: int,
        features_per_latent: int,
        params_per_channel: int,
        classes: int,
    ) -> None:
        super().__init__()
        if classes:
            raise ValueError(f"linear: principal components have no place for {classes} classes; take another backbone")
        if not 0 <= config.overlap <= config.patch:
            raise ValueError(f"linear: overlap {config.overlap} must be from 0 to the patch of {config.patch} pixels")
        self.factor, self.overlap = config.patch, config.overlap
        self.encoder_margin = self.decoder_margin = min(self.overlap, 1)
        side = config.patch + 2 * config.overlap
        self.image_channels, self.latent_channels = image_channels, latent_channels
        self.encoder = nn.Conv2d(
            image_channels, features_per_latent * latent_channels, side, stride=config.patch, padding=config.overlap
        )
        self.decoder = nn.ConvTranspose2d(
            latent_channels, params_per_channel * image_channels, side, stride=config.patch, padding=config.overlap
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        with float32_island(x):
            return self.encoder(x.to(self.encoder.weight.dtype))  # (b, features * z, h/patch, w/patch)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        with float32_island(z):
            return self.decoder(z.to(self.decoder.weight.dtype))  # (b, params * c, h, w)

    @torch.no_grad()
    def start_from_closed_form(self, moments: PatchMoments, sigma: float) -> None:
        """Set the weights to the optimum of the linear VAE with noise `sigma` (in units of the pixels).

        Probabilistic PCA (Tipping & Bishop 1999, eqs. 7-9) with the noise held fixed, whose posterior is exactly
        Gaussian and diagonal in the principal basis, so that it is also the linear VAE's optimum (Lucas et al.
        2019). Principal components come first. A component weaker than the noise would get weight zero, a saddle
        that no gradient leaves; it keeps a small weight instead.
        """
        variance, basis = self._components(moments)
        variance = variance.clamp(min=1.05 * sigma**2)
        gain = torch.sqrt(variance - sigma**2)  # (z,) W = U (L - s^2 I)^(1/2)
        project = (gain / variance) * basis  # (d, z): M^-1 W' transposed, with M = L in this basis
        self._set(moments, project, gain * basis, torch.log(sigma**2 / variance))  # s^2 M^-1

    @torch.no_grad()
    def start_from_components(self, moments: PatchMoments) -> None:
        """Set the weights to the first principal components, an orthonormal basis in and out.

        Distances of latents are then distances of pixels, which is what a codebook's nearest vector is meant by.
        """
        basis = self._components(moments)[1]
        self._set(moments, basis, basis, None)

    def _components(self, moments: PatchMoments) -> tuple[torch.Tensor, torch.Tensor]:
        """Variances (z,) and directions (d, z) of the strongest components, in order; float64."""
        z, p, c = self.latent_channels, self.factor, self.image_channels
        if moments.covariance.shape[0] != c * p * p:
            raise ValueError(f"moments of {moments.covariance.shape[0]} values do not fit patches of {c}x{p}x{p}")
        if z > c * p * p:
            raise ValueError(f"{z} latent channels exceed the {c * p * p} dimensions of a {c}x{p}x{p} patch")
        variance, basis = torch.linalg.eigh(moments.covariance)
        return variance.flip(0)[:z], basis.flip(1)[:, :z]

    def _set(
        self, moments: PatchMoments, project: torch.Tensor, back: torch.Tensor, logvar: torch.Tensor | None
    ) -> None:
        """Both convolutions from matrices (d, z) around the mean; log-variances (z,) where there are any.

        What a patch sees beyond its own pixels weighs nothing yet.
        """
        z, p, c = self.latent_channels, self.factor, self.image_channels
        own = slice(self.overlap, self.overlap + p)
        weight = torch.zeros(self.encoder.weight.shape, dtype=torch.float64)  # (features, c, side, side)
        bias = torch.zeros(weight.shape[0], dtype=torch.float64)
        weight[:z, :, own, own] = project.T.reshape(z, c, p, p)
        bias[:z] = -(moments.mean.repeat_interleave(p * p) @ project)
        if weight.shape[0] == 2 * z and logvar is not None:
            bias[z:] = logvar
        out = torch.zeros(self.decoder.weight.shape, dtype=torch.float64)  # (z, params * c, side, side)
        out[:, :c, own, own] = back.T.reshape(z, c, p, p)
        out_bias = torch.zeros(out.shape[1], dtype=torch.float64)
        out_bias[:c] = moments.mean
        self.load_state_dict(
            {"encoder.weight": weight, "encoder.bias": bias, "decoder.weight": out, "decoder.bias": out_bias}
        )
