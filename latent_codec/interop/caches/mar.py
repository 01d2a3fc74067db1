"""MAR's cached latents: `{class}/{name}.npz` with the raw posteriors, means before log-variances.

Its loader takes every folder at the top for a class and every draw from one of `moments` and `moments_flip`.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from latent_codec.interop.caches import numpy_files
from latent_codec.interop.caches.cache import PIXELS, Found, ImageCache, Item, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.requirements import need_flips, need_labels
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics
from latent_codec.model.posteriors import DiagonalGaussian


class Mar(ImageCache):
    takes = frozenset()

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        need_flips(latents, "MAR")
        need_labels(latents, "MAR")
        self.tell_range(PIXELS, "MAR")

    def name(self, entry: LatentsEntry) -> str:
        return f"{entry.path}.npz"

    def data(self, item: Item) -> bytes:
        assert item.mirrored is not None
        found = {"moments": _moments(item.posterior), "moments_flip": _moments(item.mirrored)}
        return numpy_files.npz(found, item.about)


def _moments(posterior: DiagonalGaussian) -> np.ndarray:
    return torch.cat([posterior.mean, posterior.logvar], dim=1)[0].numpy()  # (2z, h, w)


def read(folder: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    def load(path: Path) -> Stored:
        with numpy_files.load(path) as file:
            mean, logvar = numpy_files.tensor(file["moments"]).chunk(2)
            mean_flip, logvar_flip = None, None
            if "moments_flip" in file:
                mean_flip, logvar_flip = numpy_files.tensor(file["moments_flip"]).chunk(2)
            return Stored(mean, logvar, mean_flip, logvar_flip, numpy_files.about(file), None)

    for path in sorted(folder.rglob("*.npz")):
        yield Found(path.relative_to(folder).as_posix().removesuffix(".npz"), lambda path=path: load(path))
