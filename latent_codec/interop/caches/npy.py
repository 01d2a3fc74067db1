"""Write and read one draw for each image in a NumPy file `{path without suffix}.npy`, as DC-AE's training reads them.
DC-AE takes scaled latents; fast-DiT and others differ, so the user chooses the scale."""

import posixpath
from collections.abc import Iterator
from pathlib import Path

from latent_codec.interop.caches import cache, numpy_files
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import Scaling
from latent_codec.latents.format import LatentsEntry


class Npy(cache.ImageCacheWriter):
    """Write a .npy file for each image."""

    program = "DC-AE's .npy format"
    options_used = frozenset({"scale", "scaling_factor", "shift_factor", "seed", "epoch"})
    flips = "left out"
    either_scale = "files of numpy"

    def name(self, entry: LatentsEntry) -> str:
        return f"{posixpath.splitext(entry.path)[0]}.npy"

    def data(self, item: cache.CacheEntry) -> bytes:
        return numpy_files.npy(self.scaling.scale(item.z).numpy())  # (z, h, w) float32


def read(folder: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find .npy files anywhere in a folder."""

    def load(path: Path) -> cache.StoredImage:
        return cache.StoredImage(scaling.unscale(numpy_files.latents_in(numpy_files.load_npy(path))))

    return cache.images_in_files(folder, ".npy", load)


FORMAT = cache.CacheFormat(Npy, read)
