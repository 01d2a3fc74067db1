"""Write and read MAR's cached latents: `{class}/{name}.npz` with the raw posteriors, means before log-variances.
Its loader takes every top-level folder for a class, and draws from one of `moments` and `moments_flip`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from latent_codec.interop.caches import cache, numpy_files
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import Scaling
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.posteriors import DiagonalGaussian


class Mar(cache.ImageCacheWriter):
    """Write a .npz file for each image."""

    program = "MAR"
    options_used = frozenset()
    flips = "required"
    needs_labels = True

    def name(self, entry: LatentsEntry) -> str:
        return f"{entry.path}.npz"

    def data(self, item: cache.CacheEntry) -> bytes:
        assert item.mirrored is not None
        found = {"moments": _moments(item.posterior), "moments_flip": _moments(item.mirrored)}
        return numpy_files.npz(found, item.origin)


def _moments(posterior: DiagonalGaussian) -> np.ndarray:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()  # (2z, h, w)


def read(folder: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find .npz files anywhere in a folder; the mirrored image's posterior may be missing."""

    def load(path: Path) -> cache.StoredImage:
        file = numpy_files.load_npz(path)
        mean, logvar = numpy_files.latents_in(file["moments"]).chunk(2)
        mean_flip, logvar_flip = None, None
        if "moments_flip" in file:
            mean_flip, logvar_flip = numpy_files.latents_in(file["moments_flip"]).chunk(2)
        return cache.StoredImage(mean, logvar, mean_flip, logvar_flip, numpy_files.origin_in(file))

    return cache.images_in_files(folder, ".npz", load)


FORMAT = cache.CacheFormat(Mar, read)
