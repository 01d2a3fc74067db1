"""Store posteriors in shards, and read them as a torch Dataset."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latent_codec.latents.batches import BatchIndices as BatchIndices
    from latent_codec.latents.batches import ShapeBatches as ShapeBatches
    from latent_codec.latents.dataset import Latents as Latents

_HOMES = {"BatchIndices": "batches", "Latents": "dataset", "ShapeBatches": "batches"}
__all__ = ["BatchIndices", "Latents", "ShapeBatches"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading an index does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'latent_codec.latents' has no attribute {name!r}")
    return getattr(importlib.import_module(f"latent_codec.latents.{_HOMES[name]}"), name)
