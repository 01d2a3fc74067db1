"""Build a linear patch transform, and solve for its weights in closed form by probabilistic PCA."""

from typing import NamedTuple

import torch
from torch import nn

from latent_codec.model.config import LinearConfig
from latent_codec.model.networks.backbone import Backbone, BackboneShape
from latent_codec.precision import float32_island, layer_dtype


class PatchMoments(NamedTuple):
    """Holds the moments of patches flattened as (channel, row, column), d = channels * patch^2. A channel has one mean,
    as a transposed convolution has one bias for it; the covariance is taken around these means."""

    mean: torch.Tensor  # (channels,) float64
    covariance: torch.Tensor  # (d, d) float64


class LinearBackbone(Backbone):
    """Encodes by a strided convolution and decodes by a transposed one.

    A latent element sees one patch and `overlap` pixels around it. Both convolutions run in the precision of the
    weights, under autocast too: bfloat16's 8 bits are too coarse for strong components, whose posterior is narrower
    than a hundredth of their range.
    """

    def __init__(self, config: LinearConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        if shape.classes:
            raise ValueError(
                f"linear: principal components have no place for {shape.classes} classes; take another backbone"
            )
        if not 0 <= config.overlap <= config.patch:
            raise ValueError(f"linear: overlap {config.overlap} must be from 0 to the patch of {config.patch} pixels")
        self.factor, self.overlap = config.patch, config.overlap
        self.encoder_margin = self.decoder_margin = min(self.overlap, 1)
        side = config.patch + 2 * config.overlap
        self.image_channels, self.latent_channels = shape.image_channels, shape.latent_channels
        self.encoder = nn.Conv2d(shape.image_channels, shape.features, side, config.patch, config.overlap)
        self.decoder = nn.ConvTranspose2d(shape.latent_channels, shape.params, side, config.patch, config.overlap)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        with float32_island(x):
            return self.encoder(x.to(layer_dtype(self.encoder, x)))  # (b, features * z, h/patch, w/patch)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        with float32_island(z):
            return self.decoder(z.to(layer_dtype(self.decoder, z)))  # (b, params * c, h, w)

    @torch.no_grad()
    def start_from_closed_form(self, moments: PatchMoments, sigma: float) -> torch.Tensor:
        """Set the weights to the optimum of the linear VAE with noise `sigma`, in units of the pixels.

        The solution is probabilistic PCA (Tipping & Bishop 1999, eqs. 7-9) with fixed noise. Its posterior is Gaussian
        and diagonal in the principal basis, so it is also the linear VAE's optimum (Lucas et al. 2019). Components come
        strongest first. One weaker than the noise would get weight zero, a saddle that no gradient leaves; it keeps a
        small weight instead. Return the log-variances of all channels, (z,), also those that are not predicted.
        Raises `ValueError` if the moments are of another patch size.
        """
        variance, basis = self._components(moments)
        variance = variance.clamp(min=1.05 * sigma**2)
        gain = torch.sqrt(variance - sigma**2)  # (z,) W = U (L - s^2 I)^(1/2)
        project = (gain / variance) * basis  # (d, z): M^-1 W' transposed, with M = L in this basis
        logvar = torch.log(sigma**2 / variance)  # s^2 M^-1
        self._set(moments, project, gain * basis, logvar)
        return logvar

    @torch.no_grad()
    def start_from_components(self, moments: PatchMoments) -> None:
        """Set both weights to the first principal components, an orthonormal basis: distances between latents then
        equal those between pixels, as the nearest vector of a codebook needs."""
        basis = self._components(moments)[1]
        self._set(moments, basis, basis, None)

    def _components(self, moments: PatchMoments) -> tuple[torch.Tensor, torch.Tensor]:
        """Return variances (z,) and directions (d, z) of the strongest components in order, float64."""
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
        """Set both convolutions from matrices (d, z) around the mean, and log-variances (z,) where there are features.
        Pixels of the overlap get weight 0."""
        z, p, c = self.latent_channels, self.factor, self.image_channels
        own = slice(self.overlap, self.overlap + p)
        weight = torch.zeros(self.encoder.weight.shape, dtype=torch.float64)  # (features, c, side, side)
        bias = torch.zeros(weight.shape[0], dtype=torch.float64)
        weight[:z, :, own, own] = project.T.reshape(z, c, p, p)
        bias[:z] = -(moments.mean.repeat_interleave(p * p) @ project)
        if logvar is not None:
            bias[z:] = logvar[: len(bias) - z]
        out = torch.zeros(self.decoder.weight.shape, dtype=torch.float64)  # (z, params * c, side, side)
        out[:, :c, own, own] = back.T.reshape(z, c, p, p)
        out_bias = torch.zeros(out.shape[1], dtype=torch.float64)
        out_bias[:c] = moments.mean
        self.load_state_dict(
            {"encoder.weight": weight, "encoder.bias": bias, "decoder.weight": out, "decoder.bias": out_bias}
        )
