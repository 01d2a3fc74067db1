"""Build the AutoencoderKL topology of latent diffusion (Rombach et al. 2022), tensor for tensor.
Submodules carry the names that AutoencoderKL checkpoints use, so that weights move both ways by name."""

from collections import OrderedDict
from itertools import pairwise

import torch
from einops import rearrange
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from latent_codec.model.config import ConvConfig
from latent_codec.model.networks.backbone import Backbone, BackboneShape

_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """Normalises groups of channels to mean 0 and variance 1, on a CPU from contiguous memory.

    torch's CPU kernel for channels_last takes the variance as E[x^2] - E[x]^2 in float32, which is wrong wherever a
    group's mean is far from 0, as in plain or faint pictures. Its other kernels sum deviations from the mean.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.contiguous() if input.device.type == "cpu" else input)


class ResnetBlock(nn.Module):
    """Applies GroupNorm, SiLU and a 3x3 convolution twice, and adds a shortcut (1x1 where the width changes)."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, width_in, eps=_EPS)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = GroupNorm(groups, width, eps=_EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """Adds single-head self-attention over all positions to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, width, eps=_EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        out = self.to_out[0](out)
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2])


def _named(**modules: nn.Module) -> nn.Sequential:
    """Chain modules in the order given, under AutoencoderKL's names."""
    return nn.Sequential(OrderedDict(modules))


def _stages(widths: tuple[int, ...], blocks: int, groups: int, resize: str) -> nn.Sequential:
    """Build each resolution's residual blocks, and `resize` between resolutions: "downsamplers" (a stride-2
    convolution, padded below and on the right) or "upsamplers" (nearest neighbours and a convolution)."""
    stages = nn.Sequential()
    for width_in, width in pairwise((widths[0], *widths)):
        resnets = (ResnetBlock(width if i else width_in, width, groups) for i in range(blocks))
        stage = _named(resnets=nn.Sequential(*resnets))
        if len(stages) < len(widths) - 1:
            if resize == "downsamplers":
                step = _named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2))
            else:
                step = _named(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1))
            stage.add_module(resize, nn.Sequential(step))
        stages.append(stage)
    return stages


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


def _encoder(config: ConvConfig, channels_in: int, channels_out: int) -> nn.Sequential:
    """Map pixels (b, channels_in, h, w) to features (b, channels_out, h/f, w/f)."""
    widths, groups = config.widths, config.groups
    return _named(
        conv_in=nn.Conv2d(channels_in, widths[0], 3, padding=1),
        down_blocks=_stages(widths, config.layers_per_block, groups, "downsamplers"),
        mid_block=Middle(widths[-1], groups, config.mid_attention),
        conv_norm_out=GroupNorm(groups, widths[-1], eps=_EPS),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], channels_out, 3, padding=1),
    )


def _decoder(config: ConvConfig, channels_in: int, channels_out: int) -> nn.Sequential:
    """Map latents (b, channels_in, h/f, w/f) to parameters (b, channels_out, h, w)."""
    widths, groups = config.widths[::-1], config.groups
    return _named(
        conv_in=nn.Conv2d(channels_in, widths[0], 3, padding=1),
        mid_block=Middle(widths[0], groups, config.mid_attention),
        up_blocks=_stages(widths, config.layers_per_block + 1, groups, "upsamplers"),
        conv_norm_out=GroupNorm(groups, widths[-1], eps=_EPS),
        conv_act=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], channels_out, 3, padding=1),
    )


class ConvBackbone(Backbone):
    """Pairs the encoder and decoder of AutoencoderKL with its 1x1 convolutions on either side of the latents."""

    encoder_margin = decoder_margin = None  # GroupNorm and attention see the whole image
    contiguous_on_cpu = True  # as GroupNorm needs it there

    def __init__(self, config: ConvConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        if any(width % config.groups for width in config.widths):
            raise ValueError(f"conv: groups {config.groups} must divide every width of {config.widths}")
        self.factor = 2 ** (len(config.widths) - 1)
        self.latent_channels = shape.latent_channels
        self.encoder = _encoder(config, shape.encoder_in, shape.features)
        self.decoder = _decoder(config, shape.decoder_in, shape.params)
        z = shape.latent_channels
        self.quant_conv = nn.Conv2d(shape.features, shape.features, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.post_quant_conv else nn.Identity()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_conv(self.encoder(x))  # (b, features * z, h/f, w/f)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        latents, labels = z.tensor_split([self.latent_channels], 1)
        return self.decoder(torch.cat([self.post_quant_conv(latents), labels], 1))  # (b, params * c, h, w)
