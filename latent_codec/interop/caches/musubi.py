"""Write and read musubi-tuner's cached latents of images: one draw in `{name}_{W}x{H}_{architecture}.safetensors`, in
one folder. The architecture decides the layout, and whether the trainer or the cache scales latents. WxH is the size in
the image file's header, because musubi-tuner does not turn images by EXIF."""

import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images.buckets import MUSUBI_STEP
from latent_codec.interop.caches import cache
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.safetensors_files import file_bytes, latents_in, origin_in
from latent_codec.interop.caches.scaling import Scaling, prescribed_scaling
from latent_codec.interop.caches.sizes import size_notes
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.tensors import KEY, open_tensors

_KEY = re.compile(r"latents_(\d+x)?\d+x\d+_[a-z]+\d+")


class Architecture(NamedTuple):
    """Describe the files of one architecture."""

    full_name: str
    """Name in the files' metadata."""
    frames: bool
    """True if latents are (z, 1, h, w)."""
    frames_in_key: bool
    scaled: bool


ARCHITECTURES = {
    "hv": Architecture("hunyuan_video", True, True, False),
    "hv15": Architecture("hunyuan_video_1_5", True, True, False),
    "wan": Architecture("wan", True, True, True),
    "qi": Architecture("qwen_image", True, True, True),
    "kr2": Architecture("krea2", True, True, True),
    "zi": Architecture("z_image", False, True, False),
    "f2d": Architecture("flux_2_dev", False, False, True),
    "f2k4b": Architecture("flux_2_klein_4b", False, False, True),
    "f2k9b": Architecture("flux_2_klein_9b", False, False, True),
}
"""The architectures whose caches hold only an image's latents, by their name in file names."""


class Musubi(cache.ImageCacheWriter):
    """Write a safetensors file for each image."""

    program = "musubi-tuner"
    options_used = frozenset({"arch", "scaling_factor", "shift_factor", "seed", "epoch"})
    flips = "left out"

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        super().__init__(latents, options)
        self.notes += size_notes(latents.entries, self.program, MUSUBI_STEP, "musubi")

    @classmethod
    def scaling_for(cls, options: CacheOptions, statistics: LatentStatistics | None) -> Scaling:
        scaled = _architecture(options).scaled
        return prescribed_scaling(scaled, options, statistics, f"musubi-tuner's {options.arch}")

    def name(self, entry: LatentsEntry) -> str:
        stem = posixpath.splitext(posixpath.basename(entry.path))[0]
        return "{}_{:04d}x{:04d}_{}.safetensors".format(stem, *entry.geometry.stored_size, self.options.arch)

    def data(self, item: cache.CacheEntry) -> bytes:
        z, architecture = self.scaling.scale(item.z), _architecture(self.options)  # (z, h, w)
        key = f"latents_{'1x' if architecture.frames_in_key else ''}{z.shape[1]}x{z.shape[2]}_float32"
        width, height = item.entry.geometry.stored_size
        metadata = {
            "architecture": architecture.full_name,
            "width": str(width),
            "height": str(height),
            "format_version": "1.0.1",
            KEY: item.origin.text(),
        }
        return file_bytes({key: (z[:, None] if architecture.frames else z).contiguous()}, metadata)


def _architecture(options: CacheOptions) -> Architecture:
    if options.arch not in ARCHITECTURES:
        raise UserError(
            f"musubi-tuner's files are for one architecture, and here for those whose files hold images' latents and "
            f"nothing else; give --arch {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[options.arch]


def read(folder: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find the files of one architecture in a folder; a video's latents are refused one by one."""
    architecture, suffix = _architecture(options), f"_{options.arch}.safetensors"

    def load(path: Path) -> cache.StoredImage:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("architecture") != architecture.full_name:
                raise ValueError(f"it is for architecture {metadata.get('architecture')}, not {architecture.full_name}")
            (key,) = [key for key in file.keys() if _KEY.fullmatch(key)]  # noqa: SIM118
            found = file.get_tensor(key)
            if found.ndim == 4 and found.shape[1] == 1:
                found = found[:, 0]  # (z, h, w)
            size = int(metadata["width"]), int(metadata["height"])
            return cache.StoredImage(scaling.unscale(latents_in(found)), origin=origin_in(file), size=size)

    for path in sorted(folder.glob(f"*{suffix}")):
        yield cache.FoundImage(path.name.removesuffix(suffix).rpartition("_")[0], functools.partial(load, path))


FORMAT = cache.CacheFormat(Musubi, read)
