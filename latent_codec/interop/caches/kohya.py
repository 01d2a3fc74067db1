"""sd-scripts' cached latents: `{name}_{W}x{H}_sd.npz` beside the image, one draw in float32.

Of SD and SDXL the draw is raw, for the trainer multiplies it by 0.18215 or 0.13025. Of FLUX it is scaled, and every key
ends in the latents' height and width.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latent_codec.errors import UserError
from latent_codec.interop.caches import numpy_files
from latent_codec.interop.caches.cache import PIXELS, Found, ImageCache, Item, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.scaling import RAW, Scaling, scaling_of
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics

ARCHITECTURES = ("sd", "sdxl", "flux")
_FACTOR = 8  # the trainers' own
_LATENTS = re.compile(r"latents(_\d+x\d+)?")


class Kohya(ImageCache):
    takes = frozenset({"arch", "scaling_factor", "shift_factor", "seed", "epoch"})

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        self._arch = _arch(options)
        self._scaling = _scaling(options, latents.header.statistics)
        if latents.header.factor != _FACTOR:
            raise UserError(
                f"kohya's trainers take latents at 1/{_FACTOR} of each side, these are at 1/{latents.header.factor}; "
                "encode with another model"
            )
        self.tell_range(PIXELS, "kohya")

    def name(self, entry: LatentsEntry) -> str:
        size = f"{entry.geometry.width:04d}x{entry.geometry.height:04d}"
        return f"{posixpath.splitext(entry.path)[0]}_{size}_{self._arch}.npz"

    def data(self, item: Item) -> bytes:
        geometry = item.entry.geometry
        z = self._scaling.scale(item.z)
        end = f"_{z.shape[1]}x{z.shape[2]}" if self._arch == "flux" else ""
        found = {
            f"latents{end}": z.numpy(),
            f"original_size{end}": np.array([geometry.width, geometry.height]),
            f"crop_ltrb{end}": np.array([0, 0, geometry.width, geometry.height]),  # nothing is cut off
        }
        if (flipped := item.z_flip) is not None:
            found[f"latents_flipped{end}"] = self._scaling.scale(flipped).numpy()
        return numpy_files.npz(found, item.about)


def _arch(options: Options) -> str:
    if options.arch not in ARCHITECTURES:
        raise UserError(f"kohya's files are for one architecture; give --arch {', '.join(ARCHITECTURES)}")
    return options.arch


def _scaling(options: Options, statistics: LatentStatistics | None) -> Scaling:
    if options.arch == "flux":
        return scaling_of(options, statistics)
    if options.scaling_factor is not None:
        raise UserError(f"--scaling-factor is for --arch flux; kohya's {options.arch} files hold raw latents")
    return RAW


def read(folder: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    """The files of one architecture, anywhere in a folder."""
    end, scaling = f"_{_arch(options)}.npz", _scaling(options, statistics)

    def load(path: Path) -> Stored:
        with numpy_files.load(path) as file:
            keys = _keys(file)
            mean, flip = scaling.unscale(numpy_files.tensor(file[f"latents{keys}"])), None
            if f"latents_flipped{keys}" in file:
                flip = scaling.unscale(numpy_files.tensor(file[f"latents_flipped{keys}"]))
            width, height = (int(side) for side in file[f"original_size{keys}"])
            return Stored(mean, None, flip, None, numpy_files.about(file), (width, height))

    for path in sorted(folder.rglob(f"*{end}")):
        name = path.relative_to(folder).as_posix().removesuffix(end).rpartition("_")[0]
        yield Found(name, lambda path=path: load(path))


def _keys(file: Any) -> str:
    """What every key ends in; raises `ValueError` unless there are latents of one size."""
    found = [match[1] or "" for match in map(_LATENTS.fullmatch, file.files) if match]
    if len(found) != 1:
        raise ValueError(f"it holds latents of {len(found)} sizes, not of one")
    return found[0]
