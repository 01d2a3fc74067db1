"""Build the fast default backbone: a linear patch path, and beside it a residual network on a space-to-depth grid.
No convolution runs at full resolution and no layer takes statistics over the image: the receptive field is finite."""

import dataclasses
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import silu

from latent_codec.model.config import LinearConfig, LiteConfig
from latent_codec.model.networks.backbone import Backbone, BackboneShape
from latent_codec.model.networks.linear import LinearBackbone

_NEAR_ZERO = 1e-2


class ResidualBlock(nn.Module):
    """Computes x + conv(act(conv(act(x)))); its last convolution is initialised near zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        _near_zero(self.conv2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(silu(self.conv1(silu(x))))


def _down(stem: int, widths: tuple[int, ...], depths: tuple[int, ...], c: int, out: int) -> nn.Sequential:
    """Build the encoder's network, (b, c, h, w) -> (b, out, h/8, w/8) for a patch of 8."""
    layers: list[nn.Module] = [nn.PixelUnshuffle(stem), nn.Conv2d(c * stem**2, widths[0], 3, padding=1)]
    layers += [ResidualBlock(widths[0]) for _ in range(depths[0])]
    for (narrow, wide), depth in zip(pairwise(widths), depths[1:], strict=True):
        layers.append(nn.Conv2d(narrow, wide, 2, stride=2))
        layers += [ResidualBlock(wide) for _ in range(depth)]
    layers += [nn.SiLU(), nn.Conv2d(widths[-1], out, 3, padding=1)]
    _near_zero(layers[-1])
    return nn.Sequential(*layers)


def _up(stem: int, widths: tuple[int, ...], depths: tuple[int, ...], z: int, out: int) -> nn.Sequential:
    """Build the decoder's network, (b, z, h/8, w/8) -> (b, out, h, w) for a patch of 8."""
    layers: list[nn.Module] = [nn.Conv2d(z, widths[-1], 3, padding=1)]
    layers += [ResidualBlock(widths[-1]) for _ in range(depths[-1])]
    for (wide, narrow), depth in zip(pairwise(widths[::-1]), depths[-2::-1], strict=True):
        layers.append(nn.ConvTranspose2d(wide, narrow, 2, stride=2))
        layers += [ResidualBlock(narrow) for _ in range(depth)]
    layers += [nn.SiLU(), nn.Conv2d(widths[0], out * stem**2, 3, padding=1)]
    _near_zero(layers[-1])
    return nn.Sequential(*layers, nn.PixelShuffle(stem))


def _down_margin(depths: tuple[int, ...]) -> int:
    """Return the latent elements that `_down` sees on each side of a latent's own patch."""
    reach = 1 + 2 * depths[-1]  # in elements of the coarsest grid, from the last convolution back to the first
    for depth in depths[-2::-1]:
        reach = 2 * reach + 2 * depth  # a finer grid has two elements for one
    return -(-(reach + 1) // 2 ** (len(depths) - 1))


def _up_margin(depths: tuple[int, ...]) -> int:
    """Return the latent elements that `_up` sees on each side of the one whose pixels it makes."""
    reach = 1 + 2 * depths[0]  # in elements of the finest grid, from the last convolution back to the first
    for depth in depths[1:]:
        reach = -(-reach // 2) + 2 * depth
    return reach + 1


def _near_zero(conv: nn.Module) -> None:
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    with torch.no_grad():
        conv.weight.mul_(_NEAR_ZERO)
        conv.bias.zero_()


class LiteBackbone(Backbone):
    """Adds a linear path and a residual network, for features = linear(x) + residual(x) and parameters alike."""

    def __init__(self, config: LiteConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        _check(config)
        self.factor = config.patch
        self.encoder_margin = _down_margin(config.encoder_depths)
        self.decoder_margin = _up_margin(config.decoder_depths)
        self.linear = LinearBackbone(  # the residual network alone sees the labels
            LinearConfig(patch=config.patch, overlap=config.overlap), dataclasses.replace(shape, classes=0)
        )
        encoder = config.encoder_widths, config.encoder_depths, shape.encoder_in, shape.features
        decoder = config.decoder_widths, config.decoder_depths, shape.decoder_in, shape.params
        self.encoder, self.decoder = _down(config.stem, *encoder), _up(config.stem, *decoder)
        self.image_channels, self.latent_channels = shape.image_channels, shape.latent_channels

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        # Autocast applies to the residual network alone: its output is small and may be coarse.
        return self.linear.encode(x[:, : self.image_channels]) + self.encoder(x)  # (b, features * z, h/patch, w/patch)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.linear.decode(z[:, : self.latent_channels]) + self.decoder(z)  # (b, params * c, h, w)


def _check(config: LiteConfig) -> None:
    if config.stem < 2:
        raise ValueError(f"lite: stem {config.stem} would convolve at full resolution; it must be at least 2")
    for name in ("encoder", "decoder"):
        widths, depths = getattr(config, f"{name}_widths"), getattr(config, f"{name}_depths")
        if len(widths) != len(depths) or not widths:
            raise ValueError(f"lite: {name}_widths {widths} and {name}_depths {depths} must name the same resolutions")
        if config.stem * 2 ** (len(widths) - 1) != config.patch:
            raise ValueError(
                f"lite: stem {config.stem} doubled {len(widths) - 1} times is not the patch of {config.patch} pixels; "
                f"{name}_widths must name log2(patch / stem) + 1 resolutions"
            )
