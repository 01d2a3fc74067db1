"""Posteriors of many images on disk as a torch `Dataset`, for training on."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from latent_codec.errors import UserError
from latent_codec.latents.batches import Rows
from latent_codec.latents.format import (
    INDEX,
    Entry,
    StoredDtype,
    check_model,
    latent_size,
    parts,
    read_index,
    tensor_name,
)
from latent_codec.latents.shard_reader import ShardReader, Span
from latent_codec.model.bottlenecks import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key, uniform

_FLIP = 1  # what a key is used for, beside the noise
_CACHED = 2**18
"""Bytes that are still in a processor's cache when they are looked at again."""


class _Kind(NamedTuple):
    """How numbers of a type lie in a shard."""

    dtype: torch.dtype
    name: str
    """As safetensors calls it."""
    bits: type[np.unsignedinteger[Any]]
    magnitude: int
    """All bits but the sign's."""
    infinity: int
    """Its bits: those of finite numbers are below, but for the sign."""


_KINDS: dict[StoredDtype, _Kind] = {
    "float16": _Kind(torch.float16, "F16", np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": _Kind(torch.bfloat16, "BF16", np.uint16, 0x7FFF, 0x7F80),
    "float32": _Kind(torch.float32, "F32", np.uint32, 0x7FFFFFFF, 0x7F800000),
}


@contextlib.contextmanager
def _naming(current: Callable[[], Entry]) -> Iterator[None]:
    """What goes wrong with the shard of the image at hand as `UserError`."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason, entry = (error.strerror if isinstance(error, OSError) else None) or error, current()
        raise UserError(f"{entry.path}: shard {entry.shard} cannot be read: {reason}") from error


class LatentSample(NamedTuple):
    z: torch.Tensor  # (z, h, w) float32
    path: str
    label: int
    """A number of `Latents.classes`, or -1 at the top level."""


class LatentBatch(NamedTuple):
    """Of images of one size."""

    z: torch.Tensor  # (b, z, h, w) float32
    paths: list[str]
    labels: torch.Tensor  # (b,) int64, as in `LatentSample`

    def __reduce__(self) -> tuple[Any, ...]:
        """As `Moments`."""
        return _batch, (self.z, self.paths, self.labels.tolist())


def _batch(z: torch.Tensor, paths: list[str], labels: list[int]) -> LatentBatch:
    return LatentBatch(z, paths, torch.tensor(labels))


class Moments(NamedTuple):
    """Posteriors of images of one size as they are stored, and what `Latents.draw` draws by."""

    mean: torch.Tensor  # (b, z, h, w) of the stored type
    logvar: torch.Tensor
    keys: torch.Tensor  # (b,) int64
    paths: list[str]
    labels: torch.Tensor  # (b,) int64, as in `LatentSample`

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes each tensor is a file handle, which takes as long as reading does: small ones go as lists,
        and the halves of one as one.
        """
        mean, logvar = self.mean, self.logvar
        one = mean.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()
        if one and mean.is_contiguous() and logvar.storage_offset() == mean.storage_offset() + mean.numel():
            both = mean.as_strided((2, *mean.shape), (mean.numel(), *mean.stride()))
        else:
            both = torch.stack([mean, logvar])
        return _moments, (both, self.keys.tolist(), self.paths, self.labels.tolist())

    def to(self, device: torch.device | str) -> "Moments":
        mean, logvar, keys, labels = (
            t.to(device, non_blocking=True) for t in (self.mean, self.logvar, self.keys, self.labels)
        )
        return Moments(mean, logvar, keys, self.paths, labels)


def _moments(both: torch.Tensor, keys: list[int], paths: list[str], labels: list[int]) -> Moments:
    return Moments(both[0], both[1], torch.tensor(keys), paths, torch.tensor(labels))


class Latents(Dataset[LatentSample]):
    """The folder as a torch `Dataset` that draws z = mean + std * noise anew from (seed, epoch, path).

    An item is a `LatentSample`; indexed by `batches.Rows`, which say their epoch, it is a `LatentBatch`. `normalize`
    scales z by the model's statistics to mean 0 and standard deviation 1 per channel. `model_id`, where given, must be
    the model that made the latents. With `flip` half of the draws are of the mirrored images, chosen by (seed, epoch,
    path) as well; the other half are what they are without it. Raises `UserError` for a folder that is none of ours or
    lacks what is asked for, and for an image whose shard is missing or damaged. It may be used by several threads and
    copied to other processes.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int = 0,
        normalize: bool = False,
        model_id: str | None = None,
        flip: bool = False,
    ) -> None:
        self.folder, self.seed, self.epoch, self.flip = Path(folder), seed, 0, flip
        self.header, self.entries = read_index(self.folder / INDEX)
        if flip and not self.header.flips:
            raise UserError(f"{folder}: holds no latents of mirrored images; encode with --flips")
        if model_id is not None:
            check_model(self.header, model_id, str(folder))
        self._scale: tuple[torch.Tensor, torch.Tensor] | None = None
        if normalize:
            if self.header.statistics is None:
                raise UserError(f"{folder}: the model had no latent statistics; export it with `latent-codec export`")
            mean, std = (
                torch.tensor(v)[:, None, None] for v in (self.header.statistics.mean, self.header.statistics.std)
            )
            self._scale = (mean, std)
        self.classes: tuple[str, ...] = tuple(sorted({e.label for e in self.entries if e.label is not None}))
        """Names of the folders at the top, sorted; their places here are the labels."""
        numbers = {None: -1} | {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[e.label] for e in self.entries], dtype=torch.int64)  # (n,)
        self.shapes = [latent_size(e.geometry, self.header.factor) for e in self.entries]
        """(height, width) of each image's latents, for `batches.ShapeBatches`."""
        self._keys = torch.tensor([text_key(e.path) for e in self.entries], dtype=torch.int64)  # (n,)
        self._reader = ShardReader(self.folder)

    def set_epoch(self, epoch: int) -> None:
        """Draws of different epochs are independent.

        A `DataLoader`'s workers that are there already do not hear of it: give those `batches.ShapeBatches`.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.entries)

    def posterior(self, index: int, *, flip: bool = False) -> DiagonalGaussian:
        """The stored posterior of one image, or of its mirror image, as a batch of one, float32."""
        mean, logvar = self._read([index], [flip])
        return DiagonalGaussian(mean.float(), logvar.float())  # (1, z, h/f, w/f)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, Rows):
            return self.__getitems__([int(index)])[0]
        moments = self.moments(index)
        return LatentBatch(self.draw(moments), moments.paths, moments.labels)

    def __getitems__(self, indices: Sequence[int] | Rows) -> list[LatentSample]:
        """Several at once, of any sizes: what a `DataLoader` that makes batches itself asks for."""
        rows, epoch = indices if isinstance(indices, Rows) else (indices, self.epoch)
        by_size: dict[tuple[int, int], list[int]] = {}
        for index in rows:
            by_size.setdefault(self.shapes[index], []).append(index)
        found: dict[int, LatentSample] = {}
        for same in by_size.values():
            moments = self.moments(Rows(tuple(same), epoch))
            samples = zip(self.draw(moments), moments.paths, moments.labels.tolist(), strict=True)
            found |= zip(same, (LatentSample(*sample) for sample in samples), strict=True)
        return [found[index] for index in rows]

    def moments(self, rows: Rows) -> Moments:
        """The posteriors of images of one size, to be drawn elsewhere: on a GPU noise costs next to nothing."""
        chosen = torch.tensor(rows.indices)
        paths = [self.entries[index].path for index in rows.indices]
        keys = fold(self.seed, rows.epoch, self._keys[chosen])
        flips = uniform(fold(keys, _FLIP)) < 0.5 if self.flip else torch.zeros(len(keys), dtype=torch.bool)
        return Moments(*self._read(rows.indices, flips.tolist()), keys, paths, self.labels[chosen])

    def draw(self, moments: Moments) -> torch.Tensor:
        """mean + std * noise, scaled if it was asked for, (b, z, h, w) float32 on the moments' device."""
        posterior = DiagonalGaussian(moments.mean.float(), moments.logvar.float())
        z = posterior.sample(normal(moments.keys, tuple(posterior.mean.shape[1:])))
        if self._scale is not None:
            mean, std = (t.to(z.device) for t in self._scale)
            z = (z - mean) / std
        return z

    def _read(self, indices: Sequence[int], flips: Sequence[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log-variances of images of one size, mirrored or not, (b, z, h, w) of the stored type each."""
        kind, size = _KINDS[self.header.dtype], self.shapes[indices[0]]
        entries = [self.entries[index] for index in indices]
        for entry, index in zip(entries, indices, strict=True):
            if self.shapes[index] != size:
                raise UserError(f"{entry.path}: its latents are no {size} as {entries[0].path}'s")
        both, values = torch.empty(0), np.empty(0, np.uint8)
        order = sorted((e.shard, flips[i], e.row, i) for i, e in enumerate(entries))  # as they lie on the disk
        entry = entries[0]
        with _naming(lambda: entry):
            for (shard, flip), rows in groupby(order, itemgetter(0, 1)):
                run = list(rows)
                entry = entries[run[0][3]]
                found = self._spans(shard, size, flip)
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

    def _spans(self, shard: str, size: tuple[int, int], flip: bool) -> tuple[Span, Span]:
        """Where means and log-variances of a size are in a shard, (n, z, h, w) both; raises as `ShardReader.span`."""
        mean, logvar = (self._reader.span(shard, tensor_name(part, size)) for part in parts(flip=flip))
        fits = len(mean.shape) == 4 and mean.shape[2:] == size and mean.shape == logvar.shape
        if not fits or not mean.dtype == logvar.dtype == _KINDS[self.header.dtype].name:
            raise ValueError(f"it holds {mean.dtype} {mean.shape} and {logvar.dtype} {logvar.shape}")
        return mean, logvar


def _check_finite(entries: Sequence[Entry], bits: np.ndarray, kind: _Kind) -> None:
    """Raise `UserError` for the first image whose numbers, as bits (2, b, z, h, w), are not all finite."""
    step = max(1, _CACHED // bits[:, 0].nbytes)
    for first in range(0, len(entries), step):
        magnitudes = bits[:, first : first + step] & kind.magnitude
        if magnitudes.max() >= kind.infinity:
            entry = entries[first + int((magnitudes.max((0, 2, 3, 4)) >= kind.infinity).argmax())]
            raise UserError(f"{entry.path}: row {entry.row} of shard {entry.shard} is damaged; encode the image again")


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In a data loader's worker within the memory that it shares with the loader, so that nothing is copied there."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size, device="cpu")  # as torch's own collation does
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)  # pyright: ignore[reportArgumentType]
