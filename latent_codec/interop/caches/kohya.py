"""Write and read sd-scripts' cached latents: `{name}_{W}x{H}_sd.npz` beside the image, one draw in float32. It is raw
for SD, SDXL and SD3, whose trainers scale it, and scaled for FLUX. For SD3 and FLUX keys end in the latents' height and
width."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latent_codec.errors import UserError
from latent_codec.images.buckets import KOHYA_STEPS, kohya_crop_ltrb
from latent_codec.interop.caches import cache, numpy_files
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import Scaling, prescribed_scaling
from latent_codec.interop.caches.sizes import size_notes
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics

ARCHITECTURES = tuple(KOHYA_STEPS)
_BUCKETS = {"sd": "kohya-sd", "sdxl": "kohya-sdxl", "sd3": "kohya-sdxl", "flux": "flux"}
_SIZES_IN_KEYS = ("sd3", "flux")
_FACTOR = 8  # the trainers' own
_LATENTS = re.compile(r"latents(_\d+x\d+)?")


class Kohya(cache.ImageCacheWriter):
    """Write a .npz file for each image."""

    program = "kohya"
    options_used = frozenset({"arch", "scaling_factor", "shift_factor", "seed", "epoch"})
    flips = "kept"

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        super().__init__(latents, options)
        if latents.header.factor != _FACTOR:
            raise UserError(
                f"kohya's trainers take latents at 1/{_FACTOR} of each side, these are at 1/{latents.header.factor}; "
                "encode with another model"
            )
        arch = str(options.arch)
        self.notes += size_notes(latents.entries, f"kohya's {arch}", KOHYA_STEPS[arch], _BUCKETS[arch])

    @classmethod
    def scaling_for(cls, options: CacheOptions, statistics: LatentStatistics | None) -> Scaling:
        if (arch := options.arch) not in ARCHITECTURES:
            raise UserError(f"kohya's files are for one architecture; give --arch {', '.join(ARCHITECTURES)}")
        return prescribed_scaling(arch == "flux", options, statistics, f"kohya's {arch}")

    def name(self, entry: LatentsEntry) -> str:
        size = "{:04d}x{:04d}".format(*entry.geometry.original_size)
        return f"{posixpath.splitext(entry.path)[0]}_{size}_{self.options.arch}.npz"

    def data(self, item: cache.CacheEntry) -> bytes:
        geometry = item.entry.geometry
        z = self.scaling.scale(item.z)
        end = f"_{z.shape[1]}x{z.shape[2]}" if self.options.arch in _SIZES_IN_KEYS else ""
        size, crop = geometry.original_size, (0, 0, geometry.width, geometry.height)  # nothing is cut off
        if geometry.resized is not None:
            crop = kohya_crop_ltrb(size, (geometry.width, geometry.height))
        found = {
            f"latents{end}": z.numpy(),
            f"original_size{end}": np.array(size),
            f"crop_ltrb{end}": np.array(crop),
        }
        if (flipped := item.z_flip) is not None:
            found[f"latents_flipped{end}"] = self.scaling.scale(flipped).numpy()
        return numpy_files.npz(found, item.origin)


def read(folder: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find the files of one architecture anywhere in a folder."""

    def load(path: Path) -> cache.StoredImage:
        file = numpy_files.load_npz(path)
        end = _key_end(file)
        mean, flip = (
            scaling.unscale(numpy_files.latents_in(file[f"{key}{end}"])) if f"{key}{end}" in file else None
            for key in ("latents", "latents_flipped")
        )
        assert mean is not None  # `_key_end` found it
        width, height = (int(side) for side in file[f"original_size{end}"])
        return cache.StoredImage(mean, mean_flip=flip, origin=numpy_files.origin_in(file), size=(width, height))

    for found in cache.images_in_files(folder, f"_{options.arch}.npz", load):
        yield found._replace(path=found.path.rpartition("_")[0])  # without the size


def _key_end(file: Any) -> str:
    """Return the end of every key; raises `ValueError` unless there are latents of exactly one size."""
    found = [match[1] or "" for match in map(_LATENTS.fullmatch, file) if match]
    if len(found) != 1:
        raise ValueError(f"it holds latents of {len(found)} sizes, not of one")
    return found[0]


FORMAT = cache.CacheFormat(Kohya, read)
