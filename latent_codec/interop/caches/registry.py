"""List the cache formats that latents can be written as and read from."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from latent_codec.interop.caches import comfyui, edm2, kohya, lightningdit, mar, musubi, npy, webdataset
from latent_codec.interop.caches.cache import Cache, Found
from latent_codec.interop.caches.options import CacheName, Options
from latent_codec.model.file import LatentStatistics


class Consumer(NamedTuple):
    cache: type[Cache]
    read: Callable[[Path, Options, LatentStatistics | None], Iterator[Found]]


CONSUMERS: dict[CacheName, Consumer] = {
    "kohya": Consumer(kohya.Kohya, kohya.read),
    "musubi": Consumer(musubi.Musubi, musubi.read),
    "comfyui": Consumer(comfyui.ComfyUi, comfyui.read),
    "lightningdit": Consumer(lightningdit.LightningDit, lightningdit.read),
    "mar": Consumer(mar.Mar, mar.read),
    "edm2": Consumer(edm2.Edm2, edm2.read),
    "webdataset": Consumer(webdataset.WebDataset, webdataset.read),
    "npy": Consumer(npy.Npy, npy.read),
}
