"""ComfyUI's saved latents: a safetensors file `{path}.latent` with one raw draw, (1, z, h, w) float32.

Without the empty tensor of the second key LoadLatent would take the draw for one that is multiplied by 0.18215.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from latent_codec.interop.caches.cache import PIXELS, Found, ImageCache, Item, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.safetensors_files import about_in, file_bytes, latents_in
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.tensors import KEY

_LATENT, _RAW = "latent_tensor", "latent_format_version_0"


class ComfyUi(ImageCache):
    takes = frozenset({"seed", "epoch"})

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        self.leave_out_flips("ComfyUI")
        self.tell_range(PIXELS, "ComfyUI")

    def name(self, entry: LatentsEntry) -> str:
        return f"{entry.path}.latent"

    def data(self, item: Item) -> bytes:
        return file_bytes({_LATENT: item.z[None].contiguous(), _RAW: torch.zeros(0)}, {KEY: item.about.text()})


def read(folder: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    def load(path: Path) -> Stored:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor(_LATENT)
            if found.ndim != 4 or len(found) != 1:
                raise ValueError(f"it holds latents of shape {tuple(found.shape)}, not of one image")
            if _RAW not in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                found = found / 0.18215  # of ComfyUI's first weeks: scaled
            return Stored(latents_in(found[0]), None, None, None, about_in(file), None)

    for path in sorted(folder.rglob("*.latent")):
        yield Found(path.relative_to(folder).as_posix().removesuffix(".latent"), lambda path=path: load(path))
