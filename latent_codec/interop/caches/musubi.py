"""musubi-tuner's cached latents of images: `{name}_{W}x{H}_{architecture}.safetensors`, all in one folder, one draw.

Each architecture has its own layout, and its own answer to whether the trainer scales latents or the cache does.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from latent_codec.errors import UserError
from latent_codec.interop.caches.cache import PIXELS, Found, ImageCache, Item, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.safetensors_files import about_in, file_bytes, latents_in
from latent_codec.interop.caches.scaling import RAW, Scaling, scaling_of
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.tensors import KEY

_KEY = re.compile(r"latents_(\d+x)?\d+x\d+_[a-z]+\d+")


class Architecture(NamedTuple):
    full_name: str
    """In the files' metadata."""
    frames: bool
    """Whether latents are (z, 1, h, w)."""
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
"""By the name that the files have: those whose caches hold nothing but an image's latents."""


class Musubi(ImageCache):
    takes = frozenset({"arch", "scaling_factor", "shift_factor", "seed", "epoch"})

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        self._about = _architecture(options)
        self._scaling = _scaling(options, latents.header.statistics)
        self.leave_out_flips("musubi-tuner")
        self.tell_range(PIXELS, "musubi-tuner")

    def name(self, entry: LatentsEntry) -> str:
        stem = posixpath.splitext(posixpath.basename(entry.path))[0]
        return f"{stem}_{entry.geometry.width:04d}x{entry.geometry.height:04d}_{self.options.arch}.safetensors"

    def data(self, item: Item) -> bytes:
        z = self._scaling.scale(item.z)  # (z, h, w)
        key = f"latents_{'1x' if self._about.frames_in_key else ''}{z.shape[1]}x{z.shape[2]}_float32"
        metadata = {
            "architecture": self._about.full_name,
            "width": str(item.entry.geometry.width),
            "height": str(item.entry.geometry.height),
            "format_version": "1.0.1",
            KEY: item.about.text(),
        }
        return file_bytes({key: (z[:, None] if self._about.frames else z).contiguous()}, metadata)


def _architecture(options: Options) -> Architecture:
    if options.arch not in ARCHITECTURES:
        raise UserError(
            f"musubi-tuner's files are for one architecture, and here for those whose files hold images' latents and "
            f"nothing else; give --arch {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[options.arch]


def _scaling(options: Options, statistics: LatentStatistics | None) -> Scaling:
    if _architecture(options).scaled:
        return scaling_of(options, statistics)
    if options.scaling_factor is not None:
        raise UserError(
            f"--scaling-factor is not for --arch {options.arch}, whose files hold raw latents; leave it out"
        )
    return RAW


def read(folder: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    """The files of one architecture; videos are refused one by one."""
    about, scaling = _architecture(options), _scaling(options, statistics)
    end = f"_{options.arch}.safetensors"

    def load(path: Path) -> Stored:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("architecture") != about.full_name:
                raise ValueError(f"it is for architecture {metadata.get('architecture')}, not {about.full_name}")
            (key,) = [key for key in file.keys() if _KEY.fullmatch(key)]  # noqa: SIM118
            found = file.get_tensor(key)
            if found.ndim == 4 and found.shape[1] == 1:
                found = found[:, 0]  # (z, h, w)
            size = int(metadata["width"]), int(metadata["height"])
            return Stored(scaling.unscale(latents_in(found)), None, None, None, about_in(file), size)

    for path in sorted(folder.glob(f"*{end}")):
        yield Found(path.name.removesuffix(end).rpartition("_")[0], lambda path=path: load(path))
