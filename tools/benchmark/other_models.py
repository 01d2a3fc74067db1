"""Provide other projects' autoencoders, to measure beside ours: TAEF2 and diffusers' AutoencoderKL."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig, DiagonalGaussianConfig, GaussianConfig
from latent_codec.storage.tensors import read_state

_WIDTH = 64
_LATENT_CHANNELS = 32


class Taef2(nn.Module):
    """Implement TAEF2, the tiny deterministic autoencoder for FLUX.2's latents: 8x8 pixels to 32 channels.

    Source: github.com/madebyollin/taesd (weights and code MIT). Tensors have the names of its float16 files.
    """

    factor = 8
    """Pixels per latent element along one side; images need sides divisible by it."""
    latent_channels = _LATENT_CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.encoder = _encoder()
        self.decoder = _decoder()
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, folder: Path) -> "Taef2":
        """Read `encoder.safetensors` and `decoder.safetensors` in `folder`; `UserError` if a tensor does not fit."""
        model = cls()
        for name, network in (("encoder", model.encoder), ("decoder", model.decoder)):
            remedy = f"TAEF2's weights are {name}.safetensors from its own repository"
            network.load_state_dict(read_state(folder / f"{name}.safetensors", network.state_dict(), remedy))
        return model

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents (b, 32, h/8, w/8) float32 of x (b, 3, h, w) uint8; h and w are divisible by 8."""
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"TAEF2 encodes (b, 3, h, w) uint8, not {tuple(x.shape)} {x.dtype}")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise UserError(f"TAEF2 needs sides divisible by {self.factor}, not {x.shape[3]}x{x.shape[2]}: crop first")
        return self.encoder(x.float() / 255)

    @torch.no_grad()
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return pixels (b, 3, h, w) uint8 of z (b, 32, h/8, w/8), clamped and rounded."""
        return (self.decoder(z.float()).clamp(0, 1) * 255).round().to(torch.uint8)


class _Residual(nn.Module):
    """Compute relu(x + conv(x)), at the coarsest scale after adding features pooled over the image."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        narrow, wide = nn.Conv2d(4 * _WIDTH, _WIDTH, 1, bias=False), nn.Conv2d(_WIDTH, 4 * _WIDTH, 1, bias=False)
        # The norm's statistics over the image are the pooling.
        self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * _WIDTH), nn.ReLU(), narrow) if pooled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class _SoftClamp(nn.Module):
    """Bring latents smoothly into (-3, 3), which a diffusion model may have left."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return 3 * torch.tanh(z / 3)


def _conv(inputs: int = _WIDTH, outputs: int = _WIDTH, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def _encoder() -> nn.Sequential:
    layers: list[nn.Module] = [_conv(3), _Residual()]  # (b, 64, h, w)
    for coarsest in (False, False, True):
        layers += [_conv(stride=2, bias=False), *(_Residual(pooled=coarsest) for _ in range(3))]
    return nn.Sequential(*layers, _conv(outputs=_LATENT_CHANNELS))  # (b, 32, h/8, w/8)


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = [_SoftClamp(), _conv(_LATENT_CHANNELS), nn.ReLU()]
    for coarsest in (True, False, False):
        layers += [_Residual(pooled=coarsest) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2, mode="nearest"), _conv(bias=False)]
    return nn.Sequential(*layers, _Residual(), _conv(outputs=3))  # (b, 3, h, w)


def sd_codec() -> Codec:
    """Return a codec of the shape of Stable Diffusion's AutoencoderKL with random weights."""
    widths = (128, 256, 512, 512)
    backbone = ConvConfig(
        widths=widths, layers_per_block=2, groups=32, mid_attention=True, quant_conv=True, post_quant_conv=True
    )
    bottleneck = DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0)
    likelihood = GaussianConfig(scale="fixed", sigma=0.1)
    config = CodecConfig(
        image_channels=3, latent_channels=4, backbone=backbone, bottleneck=bottleneck, likelihood=likelihood
    )
    return Codec(config)


def diffusers_autoencoder(codec: Codec) -> Any:
    """Return diffusers' `AutoencoderKL` with the weights of a `conv` codec."""
    import diffusers  # optional

    shape, autoencoder = codec.config.backbone, cast("Any", diffusers).AutoencoderKL
    assert isinstance(shape, ConvConfig)
    other = autoencoder(
        block_out_channels=shape.widths,
        down_block_types=("DownEncoderBlock2D",) * len(shape.widths),
        up_block_types=("UpDecoderBlock2D",) * len(shape.widths),
        layers_per_block=shape.layers_per_block,
        latent_channels=codec.config.latent_channels,
        norm_num_groups=shape.groups,
    )
    other.load_state_dict(codec.backbone.state_dict())
    return other.eval()
