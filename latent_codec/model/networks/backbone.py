"""Define what a backbone is: the shape that it is built for, and the interface that the codec uses."""

import abc
import dataclasses
from typing import Any

import torch
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneShape:
    """Holds the channel counts that couple a backbone to the image, the bottleneck, the likelihood and the labels."""

    image_channels: int
    """c: 1 for grey images, 3 for RGB."""
    latent_channels: int
    """z, the channels of the latents."""
    features: int
    """Channels that the bottleneck takes: 2z for a mean and a log-variance."""
    params: int
    """Channels of the likelihood's parameters, a multiple of c."""
    classes: int = 0
    """Classes of a conditional model, one-hot channels behind those of the image and of the latents; 0 for none."""

    @property
    def encoder_in(self) -> int:
        return self.image_channels + self.classes

    @property
    def decoder_in(self) -> int:
        return self.latent_channels + self.classes


class Backbone(nn.Module, abc.ABC):
    """Holds both networks of an autoencoder. A latent element has a place on a grid with one for `factor` x `factor`
    pixels; its features and its pixels' parameters depend on elements up to a margin away, on every side."""

    factor: int
    """f, the pixels per latent element along one side."""
    encoder_margin: int | None
    """Receptive field of `encode` in latent elements beyond an element's own place; None if it is the whole image."""
    decoder_margin: int | None
    """Receptive field of `decode`, likewise."""
    contiguous_on_cpu: bool = False
    """True if a CPU runs it faster with contiguous weights than with channels_last ones."""

    @abc.abstractmethod
    def __init__(self, config: Any, shape: BackboneShape) -> None:
        """Build the networks; raise `ValueError` naming the field if the config makes none."""
        super().__init__()

    @abc.abstractmethod
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (b, features, h/f, w/f) of pixels and labels (b, c + classes, h, w)."""

    @abc.abstractmethod
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return parameters (b, params, h, w) from latents and labels (b, z + classes, h/f, w/f)."""
