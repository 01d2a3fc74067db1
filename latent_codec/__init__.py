"""latent_codec: image VAEs whose stochastic latents are both a codec's payload and a diffusion model's data."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_codec.errors import UserError as UserError
    from latent_codec.images.read import read_image as read_image
    from latent_codec.latents.dataset import Latents as Latents
    from latent_codec.model.codec import Codec as Codec
    from latent_codec.model.config import CodecConfig as CodecConfig

_HOMES = {
    "Codec": "latent_codec.model.codec",
    "CodecConfig": "latent_codec.model.config",
    "Latents": "latent_codec.latents.dataset",
    "UserError": "latent_codec.errors",
    "read_image": "latent_codec.images.read",
}
__all__ = ["Codec", "CodecConfig", "Latents", "UserError", "read_image"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `latent-codec --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'latent_codec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
