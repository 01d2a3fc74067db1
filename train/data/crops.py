"""Cut training crops as a pure function of the seed and the number of samples consumed.

Sample i is the crop with key `fold(seed, i)` of image permutation(seed, i // n)[i % n], out of n images. There is no
sampler state: a run resumes by counting, and the samples do not depend on the number of processes and workers, or on
whether images are in memory or streamed.
"""

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.images import idx
from latent_codec.images.geometry import in_channels
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import Source
from latent_codec.noise import below, fold, permutation, uniform
from train.data.packed import Boxes, Packed, to_device

log = logging.getLogger(__name__)
_ORDER, _TOP, _LEFT, _FLIP, NOISE = range(5)  # purposes of a key
T = TypeVar("T", bound=tuple[torch.Tensor, ...])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Hold image files, their classes, and the number of channels to read."""

    sources: Sequence[Source]
    labels: torch.Tensor
    """(n,) int64."""
    channels: int
    read: ReadOptions = ReadOptions()


class Batch(NamedTuple):
    """Hold one micro-batch of crops."""

    pixels: torch.Tensor  # (b, c, crop, crop) uint8
    keys: torch.Tensor  # (b,) int64, for the posterior's noise
    labels: torch.Tensor  # (b,) int64, numbers of classes; zeros for an unconditional model


def fingerprint(sources: Sequence[Source]) -> str:
    """Return the SHA-256 of names and sizes, and of the content of IDX files, to identify a training set."""
    digest = hashlib.sha256("\n".join(f"{s.name}\t{s.size}" for s in sources).encode())
    for path in sorted({s.path for s in sources if s.bare is not None}):  # their names and sizes are all alike
        digest.update(hashlib.sha256(idx.content(path)).digest())
    return digest.hexdigest()


class Draw(NamedTuple):
    """Hold the image and the key of each sample."""

    image: torch.Tensor  # (b,) int64
    key: torch.Tensor  # (b,) int64


@functools.lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return permutation(n, fold(seed, _ORDER, epoch))


def draw(samples: Sequence[int], n: int, seed: int) -> Draw:
    """Return which of n images each sample number shows, and its key."""
    number = torch.tensor(samples)  # (b,)
    epoch, place = number // n, number % n
    image = torch.empty_like(number)
    for one in epoch.unique().tolist():
        of_epoch = epoch == one
        image[of_epoch] = _epoch_order(n, seed, one)[place[of_epoch]]
    return Draw(image, fold(seed, number))


def crop_boxes(key: torch.Tensor, height: torch.Tensor, width: torch.Tensor, crop: int, flip: bool) -> Boxes:
    """Draw where to crop images of the given sizes, each at least `crop`, and which to mirror."""
    return Boxes(
        top=below(height - crop + 1, fold(key, _TOP)),
        left=below(width - crop + 1, fold(key, _LEFT)),
        flip=(uniform(fold(key, _FLIP)) < 0.5) & flip,
    )


def at_least(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Repeat the last row and column until both sides reach `side`."""
    h, w = pixels.shape[-2:]
    if h < side:
        pixels = pixels[..., torch.arange(side).clamp(max=h - 1), :]
    return pixels[..., torch.arange(side).clamp(max=w - 1)] if w < side else pixels


class SamplePlan(NamedTuple):
    """Assign samples to steps, processes and micro-batches, and say how they are cropped."""

    seed: int
    crop: int
    flip: bool
    batch_size: int  # images per step over all processes
    micro_batches: int
    rank: int
    world: int

    def samples(self, step: int, micro: int) -> list[int]:
        """Return the sample numbers of one micro-batch of one step on this process."""
        size = self.batch_size // (self.world * self.micro_batches)
        start = step * self.batch_size + (self.rank * self.micro_batches + micro) * size
        return list(range(start, start + size))

    def schedule(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        """Yield the sample numbers of each micro-batch of the steps from `first_step` to before `last_step`."""
        for step in range(first_step, last_step):
            for micro in range(self.micro_batches):
                yield self.samples(step, micro)


class Batches(Protocol):
    """Provide micro-batches in the order of `SamplePlan.schedule`."""

    def batches(self, plan: SamplePlan, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the micro-batches of the steps from `first_step` to before `last_step`."""
        ...


class MemoryImages:
    """Decode all images once into one uint8 tensor on the device, and gather crops there."""

    def __init__(
        self, images: ImageSet, min_side: int, device: torch.device, *, quiet: bool = False, ahead: int = 64
    ) -> None:
        """Read the images; the crops of `ahead` micro-batches are drawn together on the CPU, which is faster."""
        count = len(images.sources)
        with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it decodes
            found = pool.map(read_or_report, images.sources, repeat(images.channels), repeat(images.read))
            read = list(tqdm(found, "reading images", count, disable=quiet or None, unit="image"))
        good = torch.tensor([i for i, image in enumerate(read) if image is not None])
        kept = [at_least(image, min_side) for image in read if image is not None]
        if not kept:
            raise _none_readable(count)
        del read
        # The next readable image takes the turn of a broken one, as in streaming.
        self.row = torch.searchsorted(good, torch.arange(count)) % len(good)
        self.labels = images.labels[good].long()
        self.packed, self.ahead = Packed(kept, device), ahead

    def batches(self, plan: SamplePlan, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield micro-batches as `Batches` does."""
        schedule = plan.schedule(first_step, last_step)
        while ahead := list(islice(schedule, self.ahead)):
            drawn = draw([i for samples in ahead for i in samples], len(self.row), plan.seed)
            row, keys = self.row[drawn.image], fold(drawn.key, NOISE)
            box = crop_boxes(drawn.key, self.packed.height[row], self.packed.width[row], plan.crop, plan.flip)
            chosen = to_device(torch.stack([keys, self.labels[row], *self.packed.places(row, box)]), self.packed.device)
            for part in chosen.split(len(ahead[0]), dim=1):  # (2 + places, b)
                yield Batch(self.packed.crops(part[2:], plan.crop), part[0], part[1])


class StreamedImages:
    """Decode images anew for every crop in worker processes, for sets larger than memory."""

    def __init__(self, images: ImageSet, workers: int, device: torch.device) -> None:
        self.images, self.workers, self.device = images, workers, device

    def batches(self, plan: SamplePlan, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield micro-batches as `Batches` does."""
        schedule = plan.schedule(first_step, last_step)
        return load_in_workers(_Crops(self.images, plan), schedule, self.workers, self.device)


def load_in_workers(
    dataset: Dataset[T], schedule: Iterator[list[int]], workers: int, device: torch.device
) -> Iterator[T]:
    """Yield a dataset's micro-batches, made in worker processes from lists of sample numbers, on the device."""
    closing = multiprocessing.RawValue(ctypes.c_bool, False)
    _OPEN.append(closing)
    loader = DataLoader(
        dataset,
        sampler=schedule,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=workers,
        worker_init_fn=functools.partial(_outlive_signals, closing=closing),
        pin_memory=device.type == "cuda",
    )
    try:
        for batch in loader:
            yield type(batch)(*(t.to(device, non_blocking=True) for t in batch))  # pyright: ignore[reportCallIssue]
    finally:
        closing.value = True
        _OPEN.remove(closing)


_OPEN: list[Any] = []
"""Flags of the loaders in use, whose workers end at a SIGTERM only once the flag is set."""


@atexit.register
def _close_all() -> None:
    """Let the workers go before Python waits for them: after an exception a loader may still be open."""
    for closing in _OPEN:
        closing.value = True


def _outlive_signals(_: int, closing: Any) -> None:
    """Leave Ctrl-C and a scheduler's signal to the main process, which still needs crops for its last step."""

    def end(_: int, __: object) -> None:
        if closing.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Crops(Dataset[Batch]):
    """Make one micro-batch from a list of sample numbers."""

    def __init__(self, images: ImageSet, plan: SamplePlan) -> None:
        self.images, self.plan = images, plan
        self.reported: set[str] = set()

    def __getitem__(self, samples: list[int]) -> Batch:
        drawn = draw(samples, len(self.images.sources), self.plan.seed)
        read = [self._read(int(image)) for image in drawn.image]
        crops = [self._crop(pixels, key) for (_, pixels), key in zip(read, drawn.key, strict=True)]
        labels = self.images.labels[torch.tensor([i for i, _ in read])]
        return Batch(torch.stack(crops), fold(drawn.key, NOISE), labels)

    def _crop(self, pixels: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        pixels = at_least(pixels, self.plan.crop)
        height, width = torch.tensor(pixels.shape[1]), torch.tensor(pixels.shape[2])
        box = crop_boxes(key, height, width, self.plan.crop, self.plan.flip)
        pixels = pixels[:, box.top : box.top + self.plan.crop, box.left : box.left + self.plan.crop]
        return pixels.flip(-1) if box.flip else pixels

    def _read(self, image: int) -> tuple[int, torch.Tensor]:
        """Return an image and its number, or the next one that can be read."""
        count = len(self.images.sources)
        for number in (*range(image, count), *range(image)):
            source = self.images.sources[number]
            try:
                return number, in_channels(source.read(self.images.read).pixels, self.images.channels)
            except UserError as error:
                if source.name not in self.reported:  # once per worker, not once per epoch
                    log.warning("skipping %s", error)
                    self.reported.add(source.name)
        raise _none_readable(count)


def _none_readable(count: int, kind: str = "") -> UserError:
    return UserError(f"none of the {count} {kind}images could be read; the first reason stands above")


def read_or_report(source: Source, channels: int, read: ReadOptions) -> torch.Tensor | None:
    """Return an image's pixels (channels, h, w) uint8, or None after a warning that says why it cannot be read."""
    try:
        return in_channels(source.read(read).pixels, channels)
    except UserError as error:
        log.warning("skipping %s", error)
        return None


class CentreCrops(NamedTuple):
    """Hold the centre crops of readable images."""

    pixels: torch.Tensor  # (n, c, side, side) uint8
    names: list[str]
    labels: torch.Tensor  # (n,) int64


def centre_crops(images: ImageSet, side: int) -> CentreCrops:
    """Cut the centre of each readable image, extending small ones; raises `UserError` if none can be read."""
    crops, names, kept = [], [], []
    for source, label in zip(images.sources, images.labels, strict=True):
        image = read_or_report(source, images.channels, images.read)
        if image is None:
            continue
        pixels = at_least(image, side)
        top, left = (pixels.shape[1] - side) // 2, (pixels.shape[2] - side) // 2
        crops.append(pixels[:, top : top + side, left : left + side].clone())  # frees the rest of the image
        names.append(source.name)
        kept.append(label)
    if not crops:
        raise _none_readable(len(images.sources), "validation ")
    return CentreCrops(torch.stack(crops), names, torch.stack(kept))
