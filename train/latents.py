"""Posterior means of stored latents in memory, and crops of them as a pure function of (seed, samples consumed)."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from latent_codec.config import dumps
from latent_codec.errors import UserError
from latent_codec.latents import Latents
from train.data import crop_boxes, draw

log = logging.getLogger(__name__)


class LatentBatch(NamedTuple):
    means: torch.Tensor  # (b, z, crop, crop) float32
    keys: torch.Tensor  # (b,) int64, for whatever is drawn

    def to(self, device: torch.device) -> "LatentBatch":
        return LatentBatch(self.means.to(device), self.keys.to(device))


class LatentCrops:
    """The means of all images at least as large as the crop, float16.

    Raises `UserError` if a folder holds another model's latents, or none is large enough.
    """

    def __init__(self, folders: Sequence[Path], model_id: str, crop: int) -> None:
        self.model_id, self.crop = model_id, crop
        self.means: list[torch.Tensor] = []
        digest, small = hashlib.sha256(), 0
        for folder in folders:
            latents = Latents(folder, model_id=model_id)
            for i, entry in enumerate(latents.entries):
                mean = latents.posterior(i).mean[0]  # (z, h, w)
                if min(mean.shape[1:]) < crop:
                    small += 1
                    continue
                self.means.append(mean.half())
                digest.update(dumps([entry.path, entry.sha256]).encode())
        if not self.means:
            raise UserError(f"none of {small} images has latents of {crop}x{crop} or more; give a smaller --crop")
        if small:
            log.warning("%d images with latents below %dx%d are left out", small, crop, crop)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.means)

    def batch(self, samples: Sequence[int], seed: int) -> LatentBatch:
        """Sample number i is the same crop of the same image in every run of a seed."""
        drawn = draw(samples, len(self.means), seed)
        chosen = [self.means[i] for i in drawn.image.tolist()]
        height, width = (torch.tensor([m.shape[side] for m in chosen]) for side in (1, 2))
        box = crop_boxes(drawn.key, height, width, self.crop, flip=False)
        crops = [
            m[:, top : top + self.crop, left : left + self.crop].float()
            for m, top, left in zip(chosen, box.top.tolist(), box.left.tolist(), strict=True)
        ]
        return LatentBatch(torch.stack(crops), drawn.key)

    def batches(self, images: int, size: int, seed: int) -> Iterator[LatentBatch]:
        """The first samples of a seed, `images` of them, a few at a time."""
        for first in range(0, images, size):
            yield self.batch(range(first, min(first + size, images)), seed)
