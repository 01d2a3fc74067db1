"""Backbones: pairs of networks with `encode(x) -> features` and `decode(z) -> parameters`.

Each takes (config, image_channels, latent_channels, features_per_latent, params_per_channel); these four integers
are all that couples a backbone to the other parts.
"""

from latent_codec.networks.conv import ConvBackbone
from latent_codec.networks.linear import LinearBackbone
from latent_codec.networks.lite import LiteBackbone

BACKBONES = {"linear": LinearBackbone, "lite": LiteBackbone, "conv": ConvBackbone}
