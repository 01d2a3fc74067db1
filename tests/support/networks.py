"""Build small backbones for tests, with weights that hide no mistake."""

import math
from typing import Any

import torch
from torch import nn

from latent_codec.model.codec import Codec
from latent_codec.model.config import (
    BackboneConfig,
    CodecConfig,
    ConvConfig,
    DiagonalGaussianConfig,
    GaussianConfig,
    LikelihoodConfig,
    LiteConfig,
    MLPConfig,
)
from latent_codec.model.networks import BackboneShape
from latent_codec.model.networks.linear import PatchMoments

LITE = LiteConfig(
    patch=8, stem=4, encoder_widths=(64, 128), encoder_depths=(1, 2), decoder_widths=(64, 128), decoder_depths=(3, 2)
)
TINY_LITE = LiteConfig(
    patch=8, stem=4, encoder_widths=(8, 8), encoder_depths=(1, 1), decoder_widths=(8, 8), decoder_depths=(1, 1)
)
_SMALL: Any = {"encoder_depths": (1, 0, 1), "decoder_widths": (8, 12, 8), "decoder_depths": (1, 1, 0)}
SMALL_LITE = LiteConfig(patch=8, stem=2, encoder_widths=(8, 8, 12), **_SMALL)
ONE_RESOLUTION = LiteConfig(
    patch=4, stem=4, encoder_widths=(8,), encoder_depths=(2,), decoder_widths=(8,), decoder_depths=(1,)
)
CONV = ConvConfig(
    widths=(8, 16, 16), layers_per_block=1, groups=4, mid_attention=True, quant_conv=True, post_quant_conv=True
)
MLP = MLPConfig(side=4, encoder_widths=(12, 8), decoder_widths=(10,), activation="tanh")
CLAMP = DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0)
FIXED = GaussianConfig(scale="fixed", sigma=0.1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shape(c: int = 3, z: int = 4, features: int = 2, params: int = 1) -> BackboneShape:
    """Return the channel counts of an unconditional Gaussian posterior and likelihood, unless told otherwise."""
    return BackboneShape(image_channels=c, latent_channels=z, features=features * z, params=params * c)


def config_of(
    backbone: BackboneConfig, c: int = 3, z: int = 4, likelihood: LikelihoodConfig = FIXED, **more: Any
) -> CodecConfig:
    """Return the config of a VAE of the backbone."""
    more = {"bottleneck": CLAMP} | more
    return CodecConfig(image_channels=c, latent_channels=z, backbone=backbone, likelihood=likelihood, **more)


def make_codec(config: CodecConfig, seed: int = 0) -> Codec:
    """Return the codec with weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Codec(config).eval()


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Set weights with scales and shifts away from 1 and 0, nothing near zero, and all of a sound size."""
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            start = 1.0 if tensor.ndim == 1 else 0.0
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
            tensor.copy_(start + torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))


def photograph_moments(c: int, patch: int, seed: int = 0) -> PatchMoments:
    """Return moments with a spectrum that falls as that of photographs does, and no two eigenvalues alike."""
    d = c * patch * patch
    basis, _ = torch.linalg.qr(torch.randn((d, d), generator=seeded(seed), dtype=torch.float64))
    variance = d / (1 + torch.arange(d, dtype=torch.float64)) ** 2
    mean = torch.linspace(-0.3, 0.4, c, dtype=torch.float64)
    return PatchMoments(mean, (basis * variance) @ basis.T)


def support(gradient: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the first and last row, and the first and last column, of what is not zero in (1, c, h, w)."""
    rows, columns = (gradient[0].abs().sum((0, d)).nonzero().flatten() for d in (2, 1))
    return rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()  # pyright: ignore[reportReturnType]


@torch.no_grad()
def overflow_float16(codec: Codec) -> None:
    """Make what the tiny codec decodes of black exceed float16's 65504, and not what it decodes of middle grey."""
    weights = codec.state_dict()
    weights["backbone.linear.encoder.weight"].fill_(0.02)  # black becomes -4, middle grey 0.015
    weights["backbone.linear.encoder.bias"].zero_()
    weights["backbone.decoder.0.weight"].fill_(2e4)
