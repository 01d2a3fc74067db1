"""Register the backbones by the `kind` of their config.

To add one: (1) write its config dataclass in `model/config.py` and name it in `BackboneConfig`; (2) write a module
here with a class that derives from `Backbone` (networks/backbone.py); (3) add a line to
`BACKBONES`. Model files, training flags and the tests that run over all backbones follow from these.
"""

from latent_codec.model.networks.backbone import Backbone, BackboneShape
from latent_codec.model.networks.conv import ConvBackbone
from latent_codec.model.networks.linear import LinearBackbone
from latent_codec.model.networks.lite import LiteBackbone
from latent_codec.model.networks.mlp import MLPBackbone

BACKBONES: dict[str, type[Backbone]] = {
    "linear": LinearBackbone,
    "lite": LiteBackbone,
    "conv": ConvBackbone,
    "mlp": MLPBackbone,
}

__all__ = ["BACKBONES", "Backbone", "BackboneShape", "ConvBackbone", "LinearBackbone", "LiteBackbone", "MLPBackbone"]
