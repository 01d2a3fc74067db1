"""Backbones: pairs of networks with `encode(x) -> features` and `decode(z) -> parameters`.

Each takes (config, image_channels, latent_channels, features_per_latent, params_per_channel); these four integers
are all that couples a backbone to the other parts. `encoder_margin` and `decoder_margin` say how far it sees: how many
latent elements beyond its own place, to each side, count for a latent's features and for its pixels' parameters; None
if that is the whole image.
"""

from latent_codec.networks.conv import ConvBackbone
from latent_codec.networks.linear import LinearBackbone
from latent_codec.networks.lite import LiteBackbone

BACKBONES = {"linear": LinearBackbone, "lite": LiteBackbone, "conv": ConvBackbone}
