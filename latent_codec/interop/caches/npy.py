"""One draw for each image in a file of numpy's: `{path without suffix}.npy`, as DC-AE's training reads them.

DC-AE takes them scaled; fast-DiT and others differ, so the scale is for the user to say.
"""

import posixpath
from collections.abc import Iterator
from pathlib import Path

from latent_codec.interop.caches import numpy_files
from latent_codec.interop.caches.cache import PIXELS, Found, ImageCache, Item, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.scaling import chosen_scaling
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics


class Npy(ImageCache):
    takes = frozenset({"scale", "scaling_factor", "shift_factor", "seed", "epoch"})

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        self._scaling = chosen_scaling(options, latents.header.statistics, "files of numpy")
        self.leave_out_flips("a .npy file")
        self.tell_range(PIXELS, "DC-AE")

    def name(self, entry: LatentsEntry) -> str:
        return f"{posixpath.splitext(entry.path)[0]}.npy"

    def data(self, item: Item) -> bytes:
        return numpy_files.npy(self._scaling.scale(item.z).numpy())  # (z, h, w) float32


def read(folder: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    scaling = chosen_scaling(options, statistics, "files of numpy")

    def load(path: Path) -> Stored:
        return Stored(scaling.unscale(numpy_files.tensor(numpy_files.load(path))), None, None, None, None, None)

    for path in sorted(folder.rglob("*.npy")):
        yield Found(path.relative_to(folder).as_posix().removesuffix(".npy"), lambda path=path: load(path))
