"""Read stored posteriors as a torch `Dataset`, for training a diffusion model."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from latent_codec.errors import UserError
from latent_codec.latents.batches import BatchIndices
from latent_codec.latents.format import (
    INDEX,
    LatentsEntry,
    StoredDtype,
    check_model,
    latent_size,
    moment_names,
    read_index,
    tensor_name,
)
from latent_codec.latents.shard_reader import ShardReader, TensorLocation
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key, uniform

_FLIP = 1  # what a key is used for, beside the noise
_CACHE_BYTES = 2**18  # stay in a processor's cache between two passes over them


class _FloatFormat(NamedTuple):
    """Describe the bits of a floating-point type in a shard."""

    dtype: torch.dtype
    name: str  # in safetensors
    bits: type[np.unsignedinteger[Any]]
    magnitude: int  # mask of all bits but the sign
    infinity: int  # bits of infinity; the magnitudes of finite numbers are below


_FORMATS: dict[StoredDtype, _FloatFormat] = {
    "float16": _FloatFormat(torch.float16, "F16", np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": _FloatFormat(torch.bfloat16, "BF16", np.uint16, 0x7FFF, 0x7F80),
    "float32": _FloatFormat(torch.float32, "F32", np.uint32, 0x7FFFFFFF, 0x7F800000),
}


@contextlib.contextmanager
def _naming(current: Callable[[], LatentsEntry]) -> Iterator[None]:
    """Turn errors about the current image's shard into `UserError`s with the image's name."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason, entry = (error.strerror if isinstance(error, OSError) else None) or error, current()
        raise UserError(f"{entry.path}: shard {entry.shard} cannot be read: {reason}") from error


class LatentSample(NamedTuple):
    """Hold one image's draw."""

    z: torch.Tensor  # (z, h, w) float32
    path: str
    label: int
    """Index into `Latents.classes`; -1 for an image at the top level."""


class LatentBatch(NamedTuple):
    """Hold draws of images of one size."""

    z: torch.Tensor  # (b, z, h, w) float32
    paths: list[str]
    labels: torch.Tensor  # (b,) int64, as in `LatentSample`

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the labels as a list, as `Moments` does."""
        return _batch, (self.z, self.paths, self.labels.tolist())


def _batch(z: torch.Tensor, paths: list[str], labels: list[int]) -> LatentBatch:
    return LatentBatch(z, paths, torch.tensor(labels))


class Moments(NamedTuple):
    """Hold stored posteriors of images of one size, and the keys of the noise that `Latents.draw` adds."""

    mean: torch.Tensor  # (b, z, h, w) in the stored type
    logvar: torch.Tensor
    keys: torch.Tensor  # (b,) int64
    paths: list[str]
    labels: torch.Tensor  # (b,) int64, as in `LatentSample`

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as one tensor and lists: between processes each tensor takes a file handle,
        which costs as much as reading the latents."""
        mean, logvar = self.mean, self.logvar
        one = mean.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()
        if one and mean.is_contiguous() and logvar.storage_offset() == mean.storage_offset() + mean.numel():
            both = mean.as_strided((2, *mean.shape), (mean.numel(), *mean.stride()))
        else:
            both = torch.stack([mean, logvar])
        return _moments, (both, self.keys.tolist(), self.paths, self.labels.tolist())

    def to(self, device: torch.device | str) -> "Moments":
        """Copy the tensors to a device."""
        mean, logvar, keys, labels = (
            t.to(device, non_blocking=True) for t in (self.mean, self.logvar, self.keys, self.labels)
        )
        return Moments(mean, logvar, keys, self.paths, labels)


def _moments(both: torch.Tensor, keys: list[int], paths: list[str], labels: list[int]) -> Moments:
    return Moments(both[0], both[1], torch.tensor(keys), paths, torch.tensor(labels))


def _class_order(name: str) -> tuple[bool, int, str]:
    """Sort numbers, as a `.cls` of WebDataset has, by their value and before words."""
    number = name.isascii() and name.isdecimal() and len(name) < 10
    return (not number, int(name) if number else 0, name)


class Latents(Dataset[LatentSample]):
    """Draw z = mean + std * noise from a folder of latents; the noise is a function of (seed, epoch, path).

    An integer index gives a `LatentSample`, `batches.BatchIndices` (which carry their epoch) a `LatentBatch`.

    Each pass of a loop or of a `DataLoader` draws anew: the n-th time that it asks for an image since `set_epoch(e)`,
    it gets the draw of epoch e + n. The counts are in memory shared with the loader's workers, and each copy of another
    kind counts for itself. An index outside a loader always gives the draw of the epoch that was set, at first 0.

    - `normalize` scales z by the model's statistics to mean 0 and standard deviation 1 per channel.
    - `model_id` must be that of the model that made the latents, if given.
    - `flip` takes half of the draws from the mirrored images, chosen by (seed, epoch, path); the other draws stay.

    Threads may share it, and it may be copied to other processes. Raises `UserError` for a folder without latents or
    without what is asked for, and for an image whose shard is missing or damaged.
    """

    def __init__(
        self, folder: Path, *, seed: int = 0, normalize: bool = False, model_id: str | None = None, flip: bool = False
    ) -> None:
        self.folder, self.seed, self.flip = Path(folder), seed, flip
        self.header, self.entries = read_index(self.folder / INDEX)
        if flip and not self.header.flips:
            raise UserError(f"{folder}: holds no latents of mirrored images; encode with --flips")
        if model_id is not None:
            check_model(self.header, model_id, str(folder))
        self._scale: list[torch.Tensor] = []  # mean and standard deviation, (z, 1, 1)
        if normalize:
            if (statistics := self.header.statistics) is None:
                raise UserError(f"{folder}: the model had no latent statistics; export it with `latent-codec export`")
            self._scale = [torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std)]
        self.classes: tuple[str, ...] = tuple(
            sorted({e.label for e in self.entries if e.label is not None}, key=_class_order)
        )
        """Sorted names of the classes, numbers by their value; a label is an index into them."""
        numbers = {None: -1} | {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[e.label] for e in self.entries], dtype=torch.int64)  # (n,)
        self.shapes = [latent_size(e.geometry, self.header.factor) for e in self.entries]
        """Height and width of each image's latents, for `batches.ShapeBatches`."""
        self._keys = torch.tensor([text_key(e.path) for e in self.entries], dtype=torch.int64)  # (n,)
        self._reader = ShardReader(self.folder)
        # The epoch that was set, then how often a loop or loader has asked for each image since, (1 + n,).
        self._counts = torch.zeros(1 + len(self.entries), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._counts.share_memory_()  # a copy made by a loader shares it already

    @property
    def epoch(self) -> int:
        """Return the epoch that was set."""
        return int(self._counts[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass, also in workers; draws of different epochs are independent."""
        self._counts.zero_()
        self._counts[0] = epoch

    def __iter__(self) -> Iterator[LatentSample]:
        for index in range(len(self)):
            yield self.__getitems__([index])[0]

    def __len__(self) -> int:
        return len(self.entries)

    def posterior(self, index: int, *, flip: bool = False) -> DiagonalGaussian:
        """Return one image's stored posterior, or its mirror image's, as a float32 batch of one."""
        mean, logvar = self._read([index], [flip])
        return DiagonalGaussian(mean.float(), logvar.float())  # (1, z, h/f, w/f)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, BatchIndices):
            # A loader that makes no batches asks one by one; a loop over indices may look at an image again.
            asked_by = sys._getframe(1).f_globals.get("__name__", "")
            rows = [int(index)]
            if asked_by.startswith("torch.utils.data."):
                return self.__getitems__(rows)[0]
            return self._samples(rows, {rows[0]: self.epoch})[0]
        moments = self.moments(index)
        return LatentBatch(self.draw(moments), moments.paths, moments.labels)

    def __getitems__(self, indices: Sequence[int] | BatchIndices) -> list[LatentSample]:
        """Return several samples of any sizes; a `DataLoader` that collates batches calls this, and it counts."""
        if isinstance(indices, BatchIndices):
            return self._samples(indices.indices, dict.fromkeys(indices.indices, indices.epoch))
        epochs = {index: self.epoch + int(self._counts[1:][index]) for index in indices}
        samples = self._samples(indices, epochs)
        self._counts[1:][list(epochs)] += 1
        return samples

    def _samples(self, rows: Sequence[int], epochs: dict[int, int]) -> list[LatentSample]:
        """Return samples of any sizes, each image of its own epoch."""
        alike: dict[tuple[tuple[int, int], int], list[int]] = {}
        for index in rows:
            alike.setdefault((self.shapes[index], epochs[index]), []).append(index)
        found: dict[int, LatentSample] = {}
        for (_, epoch), same in alike.items():
            moments = self.moments(BatchIndices(tuple(same), epoch))
            samples = zip(self.draw(moments), moments.paths, moments.labels.tolist(), strict=True)
            found |= zip(same, (LatentSample(*sample) for sample in samples), strict=True)
        return [found[index] for index in rows]

    def moments(self, rows: BatchIndices) -> Moments:
        """Return posteriors of images of one size without drawing; a GPU draws the noise faster (`draw`)."""
        chosen = torch.tensor(rows.indices)
        paths = [self.entries[index].path for index in rows.indices]
        keys = fold(self.seed, rows.epoch, self._keys[chosen])
        flips = uniform(fold(keys, _FLIP)) < 0.5 if self.flip else torch.zeros(len(keys), dtype=torch.bool)
        return Moments(*self._read(rows.indices, flips.tolist()), keys, paths, self.labels[chosen])

    def draw(self, moments: Moments) -> torch.Tensor:
        """Return mean + std * noise, normalised if chosen, (b, z, h, w) float32 on the moments' device."""
        posterior = DiagonalGaussian(moments.mean.float(), moments.logvar.float())
        z = posterior.sample(normal(moments.keys, tuple(posterior.mean.shape[1:])))
        if self._scale:
            mean, std = (t.to(z.device) for t in self._scale)
            z = (z - mean) / std
        return z

    def _read(self, indices: Sequence[int], flips: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read means and log-variances of images of one size, (b, z, h, w) in the stored type each."""
        kind, size = _FORMATS[self.header.dtype], self.shapes[indices[0]]
        entries = [self.entries[index] for index in indices]
        for entry, index in zip(entries, indices, strict=True):
            if self.shapes[index] != size:
                raise UserError(f"{entry.path}: its latents are {self.shapes[index]}, but {entries[0].path}'s {size}")
        both, values = torch.empty(0), np.empty(0, np.uint8)
        order = sorted((e.shard, flips[i], e.row, i) for i, e in enumerate(entries))  # as they lie on the disk
        entry = entries[0]
        with _naming(lambda: entry):
            for (shard, flip), rows in groupby(order, itemgetter(0, 1)):
                run = list(rows)
                entry = entries[run[0][3]]
                found = self.locate(shard, size, flip)
                if not both.numel():
                    both = _empty((2, len(indices), *found[0].shape[1:]), kind.dtype)
                    values = both.view(torch.uint8).numpy()  # (2, b, z, h, w * bytes)
                elif found[0].shape[1] != both.shape[2]:
                    raise ValueError(f"it holds {found[0].shape[1]} channels, others {both.shape[2]}")
                for _, _, row, place in run:
                    entry = entries[place]
                    self._reader.read(shard, found, row, (values[0, place], values[1, place]))
        _check_finite(entries, values.view(kind.bits), kind)
        return both[0], both[1]

    def locate(self, shard: str, size: tuple[int, int], flip: bool) -> tuple[TensorLocation, TensorLocation]:
        """Locate a shard's means and log-variances of a latent size, (n, z, h, w) each; raises as `ShardReader`."""
        mean, logvar = (self._reader.locate(shard, tensor_name(name, size)) for name in moment_names(flip=flip))
        fits = len(mean.shape) == 4 and mean.shape[2:] == size and mean.shape == logvar.shape
        if not fits or not mean.dtype == logvar.dtype == _FORMATS[self.header.dtype].name:
            raise ValueError(f"it holds {mean.dtype} {mean.shape} and {logvar.dtype} {logvar.shape}")
        return mean, logvar


def _check_finite(entries: Sequence[LatentsEntry], bits: np.ndarray, kind: _FloatFormat) -> None:
    """Raise `UserError` for the first image with values, as bits (2, b, z, h, w), that are not finite."""
    step = max(1, _CACHE_BYTES // bits[:, 0].nbytes)
    for first in range(0, len(entries), step):
        magnitudes = bits[:, first : first + step] & kind.magnitude
        if magnitudes.max() >= kind.infinity:
            entry = entries[first + int((magnitudes.max((0, 2, 3, 4)) >= kind.infinity).argmax())]
            raise UserError(f"{entry.path}: row {entry.row} of shard {entry.shard} is damaged; encode the image again")


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Allocate a tensor; in a data loader's worker in memory shared with the loader, so that it is not copied."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size, device="cpu")  # as torch's own collation does
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)  # pyright: ignore[reportArgumentType]
