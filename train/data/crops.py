"""Training crops as a pure function of (seed, samples consumed).

Sample number i is crop `fold(seed, i)` of image permutation(seed, i // n)[i % n]. There is no sampler state: a run
resumes by counting, and the samples are the same for any number of processes and workers, streamed or in memory.
"""

import functools
import hashlib
import logging
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from typing import NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.images import idx
from latent_codec.images.geometry import in_channels
from latent_codec.images.sources import Source
from latent_codec.noise import below, fold, permutation, uniform
from train.data.packed import Boxes, Packed, to_device

log = logging.getLogger(__name__)
_ORDER, _TOP, _LEFT, _FLIP, _NOISE = range(5)  # what a key is used for


class Batch(NamedTuple):
    pixels: torch.Tensor  # (b, c, crop, crop) uint8
    keys: torch.Tensor  # (b,) int64, for the posterior's noise
    labels: torch.Tensor  # (b,) int64, numbers of classes; zeros for an unconditional model


def fingerprint(sources: Sequence[Source]) -> str:
    """SHA-256 over names and sizes, and the content of IDX files: what a run was trained on."""
    digest = hashlib.sha256("\n".join(f"{s.name}\t{s.size}" for s in sources).encode())
    for path in sorted({s.path for s in sources if s.bare is not None}):  # their names and sizes are all alike
        digest.update(hashlib.sha256(idx.content(path)).digest())
    return digest.hexdigest()


class Draw(NamedTuple):
    image: torch.Tensor  # (b,) int64
    key: torch.Tensor  # (b,) int64


@functools.lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    return permutation(n, fold(seed, _ORDER, epoch))


def draw(samples: Sequence[int], n: int, seed: int) -> Draw:
    """Which image each sample number shows, out of n, and its key."""
    number = torch.tensor(samples)  # (b,)
    epoch, place = number // n, number % n
    image = torch.empty_like(number)
    for one in epoch.unique().tolist():
        of_epoch = epoch == one
        image[of_epoch] = _epoch_order(n, seed, one)[place[of_epoch]]
    return Draw(image, fold(seed, number))


def crop_boxes(key: torch.Tensor, height: torch.Tensor, width: torch.Tensor, crop: int, flip: bool) -> Boxes:
    """Where to crop images of the given sizes, each at least `crop`."""
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


class Plan(NamedTuple):
    """Which samples this process takes, and how they are cropped."""

    seed: int
    crop: int
    flip: bool
    batch_size: int  # images per step over all processes
    micro_batches: int
    rank: int
    world: int

    def samples(self, step: int, micro: int) -> list[int]:
        """The sample numbers of one micro-batch of one step on this process."""
        size = self.batch_size // (self.world * self.micro_batches)
        start = step * self.batch_size + (self.rank * self.micro_batches + micro) * size
        return list(range(start, start + size))

    def schedule(self, first_step: int, last_step: int) -> Iterator[list[int]]:
        for step in range(first_step, last_step):
            for micro in range(self.micro_batches):
                yield self.samples(step, micro)


class Batches(Protocol):
    """A source of micro-batches in the order of `Plan.schedule`."""

    def batches(self, plan: Plan, first_step: int, last_step: int) -> Iterator[Batch]: ...


_AHEAD = 64
"""Micro-batches whose crops are chosen at once, on the CPU: choosing is many small operations, gathering is few."""


class MemoryImages:
    """All images decoded once into one uint8 tensor on the device; crops are gathered there."""

    def __init__(
        self,
        sources: Sequence[Source],
        labels: torch.Tensor,
        channels: int,
        min_side: int,
        device: torch.device,
        *,
        quiet: bool,
    ) -> None:
        """`labels` (n,) are the sources' classes."""
        images = _read_all(sources, channels, quiet)
        good = [i for i, image in enumerate(images) if image is not None]
        if not good:
            raise UserError(f"none of the {len(sources)} images could be read; the first reason stands above")
        kept = [at_least(images[i], min_side) for i in good]  # pyright: ignore[reportArgumentType]
        images.clear()
        # A broken image's turn goes to the next readable one, as when streaming.
        self.row = torch.searchsorted(torch.tensor(good), torch.arange(len(sources))) % len(good)
        self.labels = labels[torch.tensor(good)].long()
        self.packed = Packed(kept, device)

    def batches(self, plan: Plan, first_step: int, last_step: int) -> Iterator[Batch]:
        schedule = plan.schedule(first_step, last_step)
        while ahead := list(islice(schedule, _AHEAD)):
            drawn = draw([i for samples in ahead for i in samples], len(self.row), plan.seed)
            row, keys = self.row[drawn.image], fold(drawn.key, _NOISE)
            box = crop_boxes(drawn.key, self.packed.height[row], self.packed.width[row], plan.crop, plan.flip)
            chosen = to_device(torch.stack([keys, self.labels[row], *self.packed.places(row, box)]), self.packed.device)
            for part in chosen.split(len(ahead[0]), dim=1):  # (2 + places, b)
                yield Batch(self.packed.crops(part[2:], plan.crop), part[0], part[1])


class StreamedImages(Dataset[Batch]):
    """Images decoded anew for every crop, in worker processes: for sets larger than memory."""

    def __init__(
        self, sources: Sequence[Source], labels: torch.Tensor, channels: int, workers: int, device: torch.device
    ) -> None:
        """`labels` (n,) are the sources' classes."""
        self.sources, self.labels, self.channels = sources, labels, channels
        self.workers, self.device = workers, device

    def batches(self, plan: Plan, first_step: int, last_step: int) -> Iterator[Batch]:
        loader = DataLoader(
            _Crops(self.sources, self.labels, self.channels, plan),
            sampler=Schedule(plan, first_step, last_step),  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=leave_signals_to_the_run,
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield Batch(*(t.to(self.device, non_blocking=True) for t in batch))


def leave_signals_to_the_run(_: int) -> None:
    """In a worker: Ctrl-C and many schedulers signal the whole process group, but the run still needs its crops."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Schedule:
    """The data loader's sampler: its items are lists of sample numbers."""

    def __init__(self, plan: Plan, first_step: int, last_step: int) -> None:
        self.plan, self.first_step, self.last_step = plan, first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.schedule(self.first_step, self.last_step)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.micro_batches


class _Crops(Dataset[Batch]):
    """Indexed by a list of sample numbers: one micro-batch."""

    def __init__(self, sources: Sequence[Source], labels: torch.Tensor, channels: int, plan: Plan) -> None:
        self.sources, self.labels, self.channels, self.plan = sources, labels, channels, plan
        self.reported: set[str] = set()

    def __getitem__(self, samples: list[int]) -> Batch:
        drawn = draw(samples, len(self.sources), self.plan.seed)
        read = [self._read(int(image)) for image in drawn.image]
        crops = [self._crop(pixels, key) for (_, pixels), key in zip(read, drawn.key, strict=True)]
        labels = self.labels[torch.tensor([i for i, _ in read])]
        return Batch(torch.stack(crops), fold(drawn.key, _NOISE), labels)

    def _crop(self, pixels: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        pixels = at_least(pixels, self.plan.crop)
        height, width = torch.tensor(pixels.shape[1]), torch.tensor(pixels.shape[2])
        box = crop_boxes(key, height, width, self.plan.crop, self.plan.flip)
        pixels = pixels[:, box.top : box.top + self.plan.crop, box.left : box.left + self.plan.crop]
        return pixels.flip(-1) if box.flip else pixels

    def _read(self, image: int) -> tuple[int, torch.Tensor]:
        """An image and its number, or the next that can be read."""
        for i in range(len(self.sources)):
            number = (image + i) % len(self.sources)
            source = self.sources[number]
            try:
                return number, in_channels(source.read().pixels, self.channels)
            except UserError as error:
                if source.name not in self.reported:  # once per worker, not once per epoch
                    log.warning("skipping %s", error)
                    self.reported.add(source.name)
        raise UserError(f"none of the {len(self.sources)} images could be read; the first reason stands above")


def read_or_report(source: Source, channels: int) -> torch.Tensor | None:
    """Pixels (channels, h, w) uint8; None, and a warning that says why, where there are none to be had."""
    try:
        return in_channels(source.read().pixels, channels)
    except UserError as error:
        log.warning("skipping %s", error)
        return None


def _read_all(sources: Sequence[Source], channels: int, quiet: bool) -> list[torch.Tensor | None]:
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        images = pool.map(read_or_report, sources, repeat(channels))
        return list(tqdm(images, "reading images", len(sources), disable=quiet or None, unit="image"))


class CentreCrops(NamedTuple):
    pixels: torch.Tensor  # (n, c, side, side) uint8
    names: list[str]
    labels: torch.Tensor  # (n,) int64


def centre_crops(sources: Sequence[Source], labels: torch.Tensor, channels: int, side: int) -> CentreCrops:
    """The middle of each readable image; small images are extended by their edges.

    Raises `UserError` if none can be read.
    """
    crops, names, kept = [], [], []
    for source, label in zip(sources, labels, strict=True):
        image = read_or_report(source, channels)
        if image is None:
            continue
        pixels = at_least(image, side)
        top, left = (pixels.shape[1] - side) // 2, (pixels.shape[2] - side) // 2
        crops.append(pixels[:, top : top + side, left : left + side].clone())  # the rest of the image can go
        names.append(source.name)
        kept.append(label)
    if not crops:
        raise UserError(f"none of the {len(sources)} validation images could be read; the first reason stands above")
    return CentreCrops(torch.stack(crops), names, torch.stack(kept))
