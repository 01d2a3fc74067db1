"""LightningDiT's latents: safetensors shards of raw draws (n, z, h, w), those of mirrored images, and class numbers.

It normalises them by `latents_stats.pt`. That file is the only pickle that is ever written here, because the trainer
reads no other; none is ever read.
"""

import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from latent_codec.errors import UserError
from latent_codec.interop.caches.cache import PIXELS, About, Found, Item, Shard, ShardCache, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.requirements import need_flips, need_labels, need_one_size
from latent_codec.interop.caches.safetensors_files import latents_in
from latent_codec.latents.dataset import Latents
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.tensors import KEY

STATISTICS = "latents_stats.pt"
_MOST_IMAGES = 1024
_MOST_BYTES = 2**27  # a shard is in memory while it is made


class LightningDit(ShardCache):
    takes = frozenset({"seed", "epoch"})
    tolerant, mistaken = False, "*.safetensors"

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        need_flips(latents, "LightningDiT")
        need_labels(latents, "LightningDiT")
        need_one_size(latents, "LightningDiT")
        self.tell_range(PIXELS, "LightningDiT")
        self._count, self._sum, self._squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def shards(self) -> list[Shard]:
        everything, size = range(len(self.latents)), 2 * self.latents.posterior(0).mean.nbytes  # of an image
        images = max(1, min(_MOST_IMAGES, _MOST_BYTES // size))
        return [
            Shard(f"latents_rank00_shard{number:03d}.safetensors", everything[start : start + images])
            for number, start in enumerate(everything[::images])
        ]

    def write(self, path: Path, items: Iterator[Item]) -> None:
        z: list[torch.Tensor] = []
        flipped: list[torch.Tensor] = []
        labels: list[int] = []
        abouts: list[str] = []
        for item in items:
            mirrored = item.z_flip
            assert mirrored is not None
            z.append(item.z)
            flipped.append(mirrored)
            labels.append(item.label)
            abouts.append(item.about.text())
        latents = torch.stack(z)  # (n, z, h, w)
        self._add(latents)
        tensors = {"latents": latents, "latents_flip": torch.stack(flipped), "labels": torch.tensor(labels)}
        save_file(tensors, path, metadata={KEY: f"[{','.join(abouts)}]"})

    def _add(self, latents: torch.Tensor) -> None:
        self._count += latents[:, 0].numel()
        self._sum = self._sum + latents.double().sum((0, 2, 3))  # (z,)
        self._squares = self._squares + latents.double().square().sum((0, 2, 3))

    def last(self) -> list[tuple[str, bytes]]:
        """Mean and standard deviation of each channel of all draws, (1, z, 1, 1) each."""
        mean = self._sum / self._count
        variance = (self._squares - self._count * mean.square()) / max(self._count - 1, 1)
        found = {"mean": mean, "std": variance.clamp(min=0).sqrt()}
        buffer = io.BytesIO()  # a file's name would go into what torch.save writes
        torch.save({name: value.float()[None, :, None, None] for name, value in found.items()}, buffer)
        return [(STATISTICS, buffer.getvalue())]


def read(folder: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    """Every image of every shard; a label becomes the first folder of a path."""

    def load(path: Path, row: int) -> Stored:
        with safe_open(path, framework="pt") as file:
            mean, flip = (latents_in(file.get_slice(key)[row]) for key in ("latents", "latents_flip"))
        about = abouts(path)[row] if abouts(path) else None
        return Stored(mean, None, flip, None, about, None)

    @lru_cache(1)
    def abouts(path: Path) -> list[About]:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(KEY, "[]"))
        return [About.parse(json.dumps(one)) for one in found]

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                labels = file.get_tensor("labels").tolist()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no shard of LightningDiT's ({error}); make it again or take it away") from error
        for row, label in enumerate(labels):
            yield Found(f"{label:05d}/{path.stem}-{row:06d}", lambda path=path, row=row: load(path, row))
