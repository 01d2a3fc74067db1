"""Build fully connected networks on small images of `side` x `side` pixels (Kingma & Welling 2014, appendix C), with
one latent vector (b, z, 1, 1) each. A larger image is cut into such squares, each encoded on its own."""

from itertools import pairwise

import torch
from einops import rearrange
from torch import nn

from latent_codec.model.config import MLPConfig
from latent_codec.model.networks.backbone import Backbone, BackboneShape

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


class MLPBackbone(Backbone):
    """Pairs two multilayer perceptrons, one from a square's pixels to its latent vector and one back."""

    encoder_margin = decoder_margin = 0

    def __init__(self, config: MLPConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        _check(config)
        self.factor = config.side
        self.image_channels = shape.image_channels
        area, activation = config.side**2, ACTIVATIONS[config.activation]
        pixels = shape.image_channels * area + shape.classes
        self.encoder = _layers((pixels, *config.encoder_widths, shape.features), activation)
        self.decoder = _layers((shape.decoder_in, *config.decoder_widths, shape.params * area), activation)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        b, h, p = x.shape[0], x.shape[2] // self.factor, self.factor
        x, labels = x[:, : self.image_channels], x[:, self.image_channels :, ::p, ::p]
        vectors = rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=p, q=p)
        vectors = torch.cat([vectors, rearrange(labels, "b n h w -> (b h w) n")], 1)
        return rearrange(self.encoder(vectors), "(b h w) f -> b f h w", b=b, h=h)  # (b, features * z, h/side, w/side)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        b, h, p = z.shape[0], z.shape[2], self.factor
        squares = self.decoder(rearrange(z, "b z h w -> (b h w) z"))  # (n, params * c * side * side)
        return rearrange(squares, "(b h w) (k p q) -> b k (h p) (w q)", b=b, h=h, p=p, q=p)  # (b, params * c, h, w)

    @torch.no_grad()
    def start_from_bias(self, params: torch.Tensor) -> None:
        """Draw Glorot and Bengio's (2010) weights, and set the last bias to parameters (params * c, side, side): given
        those of the mean image, the decoder starts from that image, as in Burda et al. (2016)."""
        for layer in (*self.encoder, *self.decoder):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        last.bias.copy_(params.flatten())


def _layers(widths: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width in pairwise(widths):
        layers += [nn.Linear(width_in, width), activation()]
    return nn.Sequential(*layers[:-1])


def _check(config: MLPConfig) -> None:
    if config.side < 1:
        raise ValueError(f"mlp: side {config.side} must be at least 1")
    for name in ("encoder_widths", "decoder_widths"):
        if any(width < 1 for width in getattr(config, name)):
            raise ValueError(f"mlp: {name} {getattr(config, name)} must be positive")
