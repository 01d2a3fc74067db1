"""Name the cache formats: each is a module of this package. Free of torch, for the command line."""

from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from latent_codec.interop.caches.cache import CacheFormat

CacheName = Literal["kohya", "musubi", "comfyui", "lightningdit", "mar", "edm2", "webdataset", "npy"]


def cache_format(name: CacheName) -> "CacheFormat":
    """Import a format's module and return its `FORMAT`."""
    return import_module(f"{__package__}.{name}").FORMAT
