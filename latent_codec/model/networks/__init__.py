"""Backbones: pairs of networks with `encode(x) -> features` and `decode(z) -> parameters`.

Each takes (config, image_channels, latent_channels, features_per_latent, params_per_channel, classes); these five
integers are all that couples a backbone to the other parts. To a conditional model's networks the labels come as
`classes` further channels of x and of z, one-hot and constant over the image. `encoder_margin` and `decoder_margin` say
how far it sees: how many latent elements beyond its own place, to each side, count for a latent's features and for its
pixels' parameters; None if that is the whole image.
"""

from latent_codec.model.networks.conv import ConvBackbone
from latent_codec.model.networks.linear import LinearBackbone
from latent_codec.model.networks.lite import LiteBackbone
from latent_codec.model.networks.mlp import MLPBackbone

BACKBONES = {"linear": LinearBackbone, "lite": LiteBackbone, "conv": ConvBackbone, "mlp": MLPBackbone}
