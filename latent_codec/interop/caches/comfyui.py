"""Write and read ComfyUI's saved latents: a safetensors file `{path}.latent` with one raw draw, (1, z, h, w) float32.
A second, empty tensor marks the draw as raw: without it LoadLatent takes it for one multiplied by 0.18215."""

from collections.abc import Iterator
from pathlib import Path

import torch

from latent_codec.interop.caches import cache
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.safetensors_files import file_bytes, latents_in, origin_in
from latent_codec.interop.caches.scaling import Scaling
from latent_codec.latents.format import LatentsEntry
from latent_codec.storage.tensors import KEY, open_tensors

_LATENT, _RAW = "latent_tensor", "latent_format_version_0"


class ComfyUi(cache.ImageCacheWriter):
    """Write a .latent file for each image."""

    program = "ComfyUI"
    options_used = frozenset({"seed", "epoch"})
    flips = "left out"

    def name(self, entry: LatentsEntry) -> str:
        return f"{entry.path}.latent"

    def data(self, item: cache.CacheEntry) -> bytes:
        return file_bytes({_LATENT: item.z[None].contiguous(), _RAW: torch.zeros(0)}, {KEY: item.origin.text()})


def read(folder: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find .latent files anywhere in a folder."""

    def load(path: Path) -> cache.StoredImage:
        with open_tensors(path) as file:
            found = file.get_tensor(_LATENT)
            if found.ndim != 4 or len(found) != 1:
                raise ValueError(f"it holds latents of shape {tuple(found.shape)}, not of one image")
            if _RAW not in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                found = found / 0.18215  # ComfyUI's first weeks stored them scaled
            return cache.StoredImage(latents_in(found[0]), origin=origin_in(file))

    return cache.images_in_files(folder, ".latent", load)


FORMAT = cache.CacheFormat(ComfyUi, read)
