"""Cut crops of stored latents as a pure function of the seed and the number of samples consumed."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from latent_codec.errors import UserError
from latent_codec.latents.batches import BatchIndices
from latent_codec.latents.dataset import Latents
from latent_codec.noise import fold
from latent_codec.storage.json_config import dumps
from train.data.crops import NOISE, Draw, SamplePlan, crop_boxes, draw, load_in_workers
from train.data.packed import Packed, to_device

log = logging.getLogger(__name__)
_CPU = torch.device("cpu")


class MeanBatch(NamedTuple):
    """Hold crops of posterior means."""

    means: torch.Tensor  # (b, z, crop, crop) float32
    keys: torch.Tensor  # (b,) int64, for all random numbers of an image


class LatentCrops:
    """Hold the float16 means of all images at least as large as the crop, and cut crops of them, on one device."""

    def __init__(self, folders: Sequence[Path], model_id: str, crop: int, device: torch.device = _CPU) -> None:
        """Read folders of latents; raises `UserError` for another model's latents, or if none is large enough."""
        self.model_id, self.crop = model_id, crop
        means: list[torch.Tensor] = []
        digest, small = hashlib.sha256(), 0
        for folder in folders:
            latents = Latents(folder, model_id=model_id)
            for i, entry in enumerate(latents.entries):
                mean = latents.posterior(i).mean[0]  # (z, h, w)
                if min(mean.shape[1:]) < crop:
                    small += 1
                    continue
                means.append(mean.half())
                digest.update(dumps([entry.path, entry.sha256]).encode())
        if not means:
            raise UserError(f"none of {small} images has latents of {crop}x{crop} or more; give a smaller --crop")
        if small:
            log.warning("%d images with latents below %dx%d are left out", small, crop, crop)
        self.packed = Packed(means, device)
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.packed)

    def batch(self, samples: Sequence[int], seed: int) -> MeanBatch:
        """Return the crops with these sample numbers, which depend on nothing but their number and the seed."""
        drawn = draw(samples, len(self), seed)
        height, width = self.packed.height[drawn.image], self.packed.width[drawn.image]
        box = crop_boxes(drawn.key, height, width, self.crop, flip=False)
        chosen = to_device(torch.stack([drawn.key, *self.packed.places(drawn.image, box)]), self.packed.device)
        return MeanBatch(self.packed.crops(chosen[1:], self.crop).float(), chosen[0])

    def batches(self, images: int, size: int, seed: int) -> Iterator[MeanBatch]:
        """Yield the first `images` samples of a seed in batches of `size`."""
        for first in range(0, images, size):
            yield self.batch(range(first, min(first + size, images)), seed)


class PosteriorBatch(NamedTuple):
    """Hold crops of posteriors, the arguments of `train.objectives.flow.FlowMatching`."""

    mean: torch.Tensor  # (b, z, crop, crop) of the stored type
    logvar: torch.Tensor
    labels: torch.Tensor  # (b,) int64; -1 for none
    keys: torch.Tensor  # (b,) int64, for all random numbers of an image


class PosteriorCrops(Dataset[PosteriorBatch]):
    """Read square crops of the posteriors of some images of a folder; an item is a micro-batch. A sample depends on its
    number and the plan's seed alone, so a run resumes by counting, with any number of processes and workers."""

    def __init__(self, latents: Latents, rows: Sequence[int], crop: int, plan: SamplePlan) -> None:
        """`rows` are the numbers of one or more images, each at least as large as the crop."""
        self.latents, self.rows, self.crop, self.plan = latents, list(rows), crop, plan
        self._shapes = latents.shapes

    def __getitem__(self, samples: Sequence[int]) -> PosteriorBatch:
        drawn = draw(samples, len(self.rows), self.plan.seed)
        epochs = [i // len(self.rows) for i in samples]
        return self.crops(Draw(torch.tensor([self.rows[i] for i in drawn.image.tolist()]), drawn.key), epochs)

    def crops(self, drawn: Draw, epochs: Sequence[int]) -> PosteriorBatch:
        """Cut crops of images given by their numbers; epochs decide which are mirrored, if mirrored latents exist."""
        shapes = self._shapes
        numbers = drawn.image.tolist()
        height, width = (torch.tensor([shapes[i][side] for i in numbers]) for side in (0, 1))
        box = crop_boxes(drawn.key, height, width, self.crop, flip=False)
        boxes = list(zip(box.top.tolist(), box.left.tolist(), strict=True))
        places: dict[tuple[tuple[int, int], int], list[int]] = {}
        for place, (number, epoch) in enumerate(zip(numbers, epochs, strict=True)):
            places.setdefault((shapes[number], epoch), []).append(place)
        crops: list[torch.Tensor] = [torch.empty(0)] * len(numbers)
        for (_, epoch), same in places.items():
            moments = self.latents.moments(BatchIndices(tuple(numbers[place] for place in same), epoch))
            for place, *both in zip(same, moments.mean, moments.logvar, strict=True):
                top, left = boxes[place]
                crops[place] = torch.stack(both)[..., top : top + self.crop, left : left + self.crop]
        mean, logvar = torch.stack(crops, 1)  # (b, z, crop, crop) each
        return PosteriorBatch(mean, logvar, self.latents.labels[drawn.image], fold(drawn.key, NOISE))

    def batches(self, first_step: int, last_step: int, workers: int, device: torch.device) -> Iterator[PosteriorBatch]:
        """Yield the micro-batches of this process from `first_step` to before `last_step`."""
        return load_in_workers(self, self.plan.schedule(first_step, last_step), workers, device)
