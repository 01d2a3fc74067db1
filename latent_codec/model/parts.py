"""Build the three parts of a model from its config."""

from itertools import pairwise
from typing import NamedTuple

from latent_codec.model.bottlenecks import BOTTLENECKS, Bottleneck
from latent_codec.model.config import CodecConfig
from latent_codec.model.likelihoods import LIKELIHOODS, Likelihood
from latent_codec.model.networks import BACKBONES, Backbone, BackboneShape


class Parts(NamedTuple):
    """Holds the modules of a model."""

    backbone: Backbone
    bottleneck: Bottleneck
    likelihood: Likelihood


def build(config: CodecConfig) -> Parts:
    """Return new modules with random weights, drawn from torch's global generator on the current default device.
    Raises `ValueError` naming the field of the config that makes no model."""
    _check_prefixes(config)
    bottleneck = BOTTLENECKS[config.bottleneck.kind](config.bottleneck, config.latent_channels)
    likelihood = LIKELIHOODS[config.likelihood.kind](config.likelihood)
    shape = BackboneShape(
        image_channels=config.image_channels,
        latent_channels=config.latent_channels,
        features=bottleneck.features,
        params=likelihood.params_per_channel * config.image_channels,
        classes=len(config.classes),
    )
    return Parts(BACKBONES[config.backbone.kind](config.backbone, shape), bottleneck, likelihood)


def _check_prefixes(config: CodecConfig) -> None:
    prefixes, channels = config.prefixes, config.latent_channels
    if not prefixes:
        return
    if prefixes[0] < 1 or prefixes[-1] != channels or any(a >= b for a, b in pairwise(prefixes)):
        raise ValueError(f"prefixes {prefixes} must rise from 1 or more to the {channels} latent channels")
    if config.bottleneck.kind != "gaussian":
        raise ValueError(f"prefixes {prefixes} need a gaussian posterior, not {config.bottleneck.kind}")
