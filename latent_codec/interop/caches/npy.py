"""Write and read one draw for each image in a NumPy file `{path without suffix}.npy`, as DC-AE's training reads them.

DC-AE takes scaled latents; fast-DiT and others differ, so the user chooses the scale.
"""

import posixpath
from collections.abc import Iterator
from pathlib import Path

from latent_codec.interop.caches import cache, numpy_files
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import chosen_scaling
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics


class Npy(cache.ImageCacheWriter):
    """Write a .npy file for each image."""

    program = "DC-AE"
    options_used = frozenset({"scale", "scaling_factor", "shift_factor", "seed", "epoch"})
    flips = "left out"

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        super().__init__(latents, options)
        self._scaling = chosen_scaling(options, latents.header.statistics, "files of numpy")

    def name(self, entry: LatentsEntry) -> str:
        return f"{posixpath.splitext(entry.path)[0]}.npy"

    def data(self, item: cache.CacheEntry) -> bytes:
        return numpy_files.npy(self._scaling.scale(item.z).numpy())  # (z, h, w) float32


def read(folder: Path, options: CacheOptions, statistics: LatentStatistics | None) -> Iterator[cache.FoundImage]:
    """Find .npy files anywhere in a folder."""
    scaling = chosen_scaling(options, statistics, "files of numpy")

    def load(path: Path) -> cache.StoredImage:
        return cache.StoredImage(scaling.unscale(numpy_files.latents_in(numpy_files.load(path))))

    return cache.images_in_files(folder, ".npy", load)


FORMAT = cache.CacheFormat(Npy, read)
