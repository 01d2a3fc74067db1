"""Build the AutoencoderKL topology of latent diffusion (Rombach et al. 2022), tensor for tensor.

Submodules carry the names that AutoencoderKL checkpoints use, so that weights move both ways by name.
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu

from latent_codec.model.config import ConvConfig
from latent_codec.model.networks.backbone import Backbone, BackboneShape

_EPS = 1e-6


class ResnetBlock(nn.Module):
    """Applies GroupNorm, SiLU and a 3x3 convolution twice, and adds a shortcut (1x1 where the width changes)."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=_EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.conv_shortcut = nn.Conv2d(width_in, width, 1)
        self.changes_width = width_in != width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.changes_width else x) + h


class Attention(nn.Module):
    """Adds single-head self-attention over all positions to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out = self.to_out[0](out)
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halves the grid by a stride-2 convolution, padded by one row below and one column to the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))  # (b, c, h/2, w/2)


class Upsample(nn.Module):
    """Doubles the grid by nearest neighbours, and convolves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))  # (b, c, 2h, 2w)


_RESIZE = {"downsamplers": Downsample, "upsamplers": Upsample}  # by AutoencoderKL's names


class Stage(nn.Module):
    """Applies the residual blocks of one resolution, then the step to the next resolution if there is one."""

    def __init__(self, width_in: int, width: int, blocks: int, groups: int, resize: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width_in if i == 0 else width, width, groups) for i in range(blocks)])
        self.resize = resize
        if resize is not None:
            setattr(self, resize, nn.ModuleList([_RESIZE[resize](width)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.resnets:
            x = block(x)
        return getattr(self, self.resize)[0](x) if self.resize else x


def _stages(widths: tuple[int, ...], blocks: int, groups: int, resize: str) -> nn.ModuleList:
    """Build the stages of an encoder or decoder, of which all but the last change the resolution."""
    return nn.ModuleList(
        [
            Stage(widths[max(i - 1, 0)], width, blocks, groups, resize if i < len(widths) - 1 else None)
            for i, width in enumerate(widths)
        ]
    )


class Middle(nn.Module):
    """Applies a residual block, attention and a residual block at the coarsest resolution."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width, groups)] if attention else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Maps pixels (b, channels_in, h, w) to features (b, channels_out, h/f, w/f)."""

    def __init__(self, config: ConvConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        widths, groups = config.widths, config.groups
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.down_blocks = _stages(widths, config.layers_per_block, groups, "downsamplers")
        self.mid_block = Middle(widths[-1], groups, config.mid_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)  # (b, widths[0], h, w)
        for stage in self.down_blocks:
            h = stage(h)
        h = self.mid_block(h)  # (b, widths[-1], h/f, w/f)
        return self.conv_out(silu(self.conv_norm_out(h)))


class Decoder(nn.Module):
    """Maps latents (b, channels_in, h/f, w/f) to parameters (b, channels_out, h, w)."""

    def __init__(self, config: ConvConfig, channels_in: int, channels_out: int) -> None:
        super().__init__()
        widths, groups = config.widths[::-1], config.groups
        self.conv_in = nn.Conv2d(channels_in, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, config.mid_attention)
        self.up_blocks = _stages(widths, config.layers_per_block + 1, groups, "upsamplers")
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], channels_out, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid_block(self.conv_in(z))  # (b, widths[-1], h/f, w/f)
        for stage in self.up_blocks:
            h = stage(h)
        return self.conv_out(silu(self.conv_norm_out(h)))  # (b, channels_out, h, w)


class ConvBackbone(Backbone):
    """Pairs the encoder and decoder of AutoencoderKL with its 1x1 convolutions on either side of the latents."""

    encoder_margin = decoder_margin = None  # GroupNorm and attention see the whole image

    def __init__(self, config: ConvConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        if any(width % config.groups for width in config.widths):
            raise ValueError(f"conv: groups {config.groups} must divide every width of {config.widths}")
        self.factor = 2 ** (len(config.widths) - 1)
        self.latent_channels = shape.latent_channels
        self.encoder = Encoder(config, shape.encoder_in, shape.features)
        self.decoder = Decoder(config, shape.decoder_in, shape.params)
        if config.quant_conv:
            self.quant_conv = nn.Conv2d(shape.features, shape.features, 1)
        if config.post_quant_conv:
            self.post_quant_conv = nn.Conv2d(shape.latent_channels, shape.latent_channels, 1)
        self.config = config

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        h = self.encoder(x)  # (b, features * z, h/f, w/f)
        return self.quant_conv(h) if self.config.quant_conv else h

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        if self.config.post_quant_conv:
            latents, labels = z.tensor_split([self.latent_channels], 1)
            z = torch.cat([self.post_quant_conv(latents), labels], 1)
        return self.decoder(z)  # (b, params * c, h, w)
