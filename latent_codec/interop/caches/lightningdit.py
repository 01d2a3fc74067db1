"""Write and read LightningDiT's latents: safetensors shards of raw draws (n, z, h, w), mirrored draws, class numbers.

The trainer normalises them by `latents_stats.pt`, the only pickle that this program ever writes, because the trainer
reads no other type; no pickle is ever read.
"""

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from latent_codec.errors import UserError
from latent_codec.interop.caches import cache
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.safetensors_files import latents_in
from latent_codec.interop.caches.scaling import Scaling
from latent_codec.latents.dataset import Latents
from latent_codec.storage.json_config import loads
from latent_codec.storage.tensors import KEY, open_tensors, write_tensors

STATISTICS = "latents_stats.pt"
_SHARD_IMAGES = 1024
_SHARD_BYTES = 2**27  # a shard is in memory while it is made


class LightningDit(cache.ShardCacheWriter):
    """Write shards, and the mean and standard deviation of each channel over all draws."""

    program = "LightningDiT"
    options_used = frozenset({"seed", "epoch"})
    flips = "required"
    needs_labels = needs_one_size = True
    may_lack_images, shard_pattern = False, "*.safetensors"

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        super().__init__(latents, options)
        self._count, self._sum, self._squares = 0, torch.zeros(()).double(), torch.zeros(()).double()

    def shards(self) -> list[cache.Shard]:
        image_bytes = 2 * self.latents.posterior(0).mean.nbytes
        images = max(1, min(_SHARD_IMAGES, _SHARD_BYTES // image_bytes))
        return self.shards_of("latents_rank00_shard{:03d}.safetensors", images)

    def write(self, path: Path, items: Iterator[cache.CacheEntry]) -> None:
        rows: list[tuple[torch.Tensor, torch.Tensor, int, str]] = []
        for item in items:
            mirrored = item.z_flip
            assert mirrored is not None
            rows.append((item.z, mirrored, item.label, item.origin.text()))
        z, flipped, labels, origins = zip(*rows, strict=True)
        latents = torch.stack(z)  # (n, z, h, w)
        self._count += latents[:, 0].numel()
        self._sum = self._sum + latents.double().sum((0, 2, 3))  # (z,)
        self._squares = self._squares + latents.double().square().sum((0, 2, 3))
        tensors = {"latents": latents, "latents_flip": torch.stack(flipped), "labels": torch.tensor(labels)}
        write_tensors(path, tensors, {KEY: f"[{','.join(origins)}]"})

    def last(self) -> list[tuple[str, bytes]]:
        mean = self._sum / self._count
        variance = (self._squares - self._count * mean.square()) / max(self._count - 1, 1)
        found = {"mean": mean, "std": variance.clamp(min=0).sqrt()}
        buffer = io.BytesIO()  # torch.save would write a file's name into it
        torch.save({name: value.float()[None, :, None, None] for name, value in found.items()}, buffer)
        return [(STATISTICS, buffer.getvalue())]


def read(folder: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find every image of every shard in a folder; a class number becomes the first folder of a path."""

    def load(path: Path, row: int) -> cache.StoredImage:
        with open_tensors(path) as file:
            mean, flip = (latents_in(file.get_slice(key)[row]) for key in ("latents", "latents_flip"))
        return cache.StoredImage(mean, mean_flip=flip, origin=origins(path)[row] if origins(path) else None)

    @functools.lru_cache(1)
    def origins(path: Path) -> list[cache.Origin]:
        with open_tensors(path) as file:
            found = loads((file.metadata() or {}).get(KEY, "[]"))
        return [cache.Origin.parse(json.dumps(one)) for one in found]

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with open_tensors(path) as file:
                labels = file.get_tensor("labels").tolist()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no shard of LightningDiT's ({error}); make it again or take it away") from error
        for row, label in enumerate(labels):
            yield cache.FoundImage(f"{label:05d}/{path.stem}-{row:06d}", functools.partial(load, path, row))


FORMAT = cache.CacheFormat(LightningDit, read)
