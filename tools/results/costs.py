"""Count parameters of networks, and FLOPs of one 256x256 image, from their shapes alone."""

import dataclasses
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig
from latent_codec.model.describe import count_flops
from tools.benchmark.other_models import Taef2, sd_codec
from train.config.presets import pca

SIDE = 256
"""Pixels."""


class Costs(NamedTuple):
    """Hold what a model's networks cost."""

    parameters: int
    """Parameters of encoder and decoder, without an entropy model's."""
    encoder: float
    """FLOPs, at 2 per multiply-accumulate."""
    decoder: float


def of_config(config: CodecConfig) -> Costs:
    """Return the costs of a codec."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Codec(config).parameters())
    flops = count_flops(config, SIDE)
    return Costs(parameters, flops.encoder, flops.decoder)


def of_pca(channels: int) -> Costs:
    """Return the costs of PCA of 8x8 patches."""
    return of_config(dataclasses.replace(pca().codec, latent_channels=channels))


def of_sd_shape(channels: int) -> Costs:
    """Return the costs of Stable Diffusion's AutoencoderKL; FLUX.1's, of 16 channels, lacks its 1x1 convolutions."""
    with torch.device("meta"):
        config = sd_codec().config
    backbone = config.backbone
    assert isinstance(backbone, ConvConfig)
    if channels == 16:
        backbone = dataclasses.replace(backbone, quant_conv=False, post_quant_conv=False)
    return of_config(dataclasses.replace(config, latent_channels=channels, backbone=backbone))


def of_taef2() -> Costs:
    """Return the costs of TAEF2."""
    with torch.device("meta"):
        model = Taef2()
        pixels = torch.zeros(1, 3, SIDE, SIDE)
        latents = torch.zeros(1, Taef2.latent_channels, SIDE // Taef2.factor, SIDE // Taef2.factor)
        with FlopCounterMode(display=False) as encoder:
            model.encoder(pixels)
        with FlopCounterMode(display=False) as decoder:
            model.decoder(latents)
    parameters = sum(p.numel() for p in model.parameters())
    return Costs(parameters, encoder.get_total_flops(), decoder.get_total_flops())
