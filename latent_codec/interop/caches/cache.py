"""Define the interface of a cache format: what its writer is given and what its reader returns."""

import abc
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import RAW, Scaling, chosen_scaling
from latent_codec.latents.batches import BatchIndices
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.file import LatentStatistics
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import normal
from latent_codec.storage.json_config import from_json, loads, to_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """Name the model and the image that latents come from; stored where a format has room that its readers ignore."""

    model_id: str
    path: str
    geometry: Geometry
    sha256: str
    """SHA-256 of the source file."""

    def text(self) -> str:
        """Return JSON in ASCII; a name that is not valid UTF-8 survives."""
        return json.dumps(to_json(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> "Origin":
        """Parse `text`'s JSON; raises `ValueError`."""
        return from_json(cls, loads(text), where="latent_codec")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """Hold one image's latents on their way into a cache. Posteriors and noise are (1, z, h, w)."""

    entry: LatentsEntry
    origin: Origin
    label: int
    """Class number; -1 without a class."""
    posterior: DiagonalGaussian
    mirrored: DiagonalGaussian | None
    """Posterior of the mirrored image, where it is stored."""
    noise: torch.Tensor
    bytes_in: int
    """Size of the stored posteriors in bytes."""

    @property
    def z(self) -> torch.Tensor:
        """Return the raw draw, (z, h, w) float32, that `Latents` makes with the same seed and epoch."""
        return self.posterior.sample(self.noise)[0]

    @property
    def z_flip(self) -> torch.Tensor | None:
        """Return the draw of the mirrored image, by the same noise as `Latents` draws it."""
        return None if self.mirrored is None else self.mirrored.sample(self.noise)[0]


def class_number(name: str | None, index: int) -> int:
    """Return the class number that a cache holds: the one that a WebDataset's `.cls` said, or else the index."""
    return int(name) if name is not None and name.isascii() and name.isdecimal() and str(int(name)) == name else index


def read_entry(latents: Latents, index: int, epoch: int) -> CacheEntry:
    """Read one image's latents; raises `UserError` with its name if its shard is missing or damaged."""
    entry = latents.entries[index]
    moments = latents.moments(BatchIndices((index,), epoch))
    posterior = DiagonalGaussian(moments.mean.float(), moments.logvar.float())  # (1, z, h, w)
    mirrored = latents.posterior(index, flip=True) if latents.header.flips else None
    return CacheEntry(
        entry=entry,
        origin=Origin(model_id=latents.header.model_id, path=entry.path, geometry=entry.geometry, sha256=entry.sha256),
        label=class_number(entry.label, int(moments.labels[0])),
        posterior=posterior,
        mirrored=mirrored,
        noise=normal(moments.keys, tuple(posterior.mean.shape[1:])),
        bytes_in=(moments.mean.nbytes + moments.logvar.nbytes) * (1 if mirrored is None else 2),
    )


class CacheWriter(abc.ABC):
    """Write latents as one program reads them; `__init__` raises `UserError` if the program cannot take these."""

    program: ClassVar[str]
    """Name of the program in messages."""
    options_used: ClassVar[frozenset[str]]
    """Fields of `CacheOptions` that make a difference."""
    flips: ClassVar[Literal["required", "kept", "left out"]]
    """Says what becomes of the latents of mirrored images."""
    needs_labels: ClassVar[bool] = False
    """True if every image must have a class."""
    needs_one_size: ClassVar[bool] = False
    """True if all latents must have one size."""
    pixel_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    """Range of the pixels that the program's autoencoder takes and gives."""
    either_scale: ClassVar[str | None] = None
    """Name in messages of files that hold raw or scaled latents, as --scale says; other files hold raw ones."""

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        self.latents, self.options = latents, options
        self.notes: list[str] = []
        """Sentences for the user about what the cache lacks."""
        header, name = latents.header, self.program
        if self.flips == "required" and not header.flips:
            raise UserError(f"{latents.folder}: {name} needs latents of mirrored images too; encode with --flips")
        if self.needs_labels:
            self._check_labels()
        if self.needs_one_size:
            self._check_one_size()
        if self.flips == "left out" and header.flips:
            self.notes.append(f"latents of mirrored images are left out: {name} has no place for them")
        if header.pixel_range != self.pixel_range:
            self.notes.append(
                f"the encoder saw pixels in {list(header.pixel_range)}, and {name} takes decoded pixels to be in "
                f"{list(self.pixel_range)}: convert them after decoding"
            )
        self.scaling = self.scaling_for(options, header.statistics)

    @classmethod
    def scaling_for(cls, options: CacheOptions, statistics: LatentStatistics | None) -> Scaling:
        """Return the scaling of latents in the files; raises `UserError` for options that contradict it."""
        return chosen_scaling(options, statistics, cls.either_scale) if cls.either_scale else RAW

    def _check_labels(self) -> None:
        if without := [entry.path for entry in self.latents.entries if entry.label is None]:
            raise UserError(
                f"{self.latents.folder}: {self.program} needs a class for each image, and {without[0]} is in no folder "
                f"({len(without)} such images); put the images of each class into a folder of its own and encode again"
            )

    def _check_one_size(self) -> None:
        first: dict[tuple[int, int], str] = {}
        for shape, entry in zip(self.latents.shapes, self.latents.entries, strict=True):
            first.setdefault(shape, entry.path)
        if len(first) > 1:
            (one, path), (other, other_path) = list(first.items())[:2]
            raise UserError(
                f"{self.latents.folder}: {self.program} takes latents of one size, and {path} has {one[0]}x{one[1]}, "
                f"{other_path} {other[0]}x{other[1]} ({len(first)} sizes in all); encode with --resize N --crop"
            )


class ImageCacheWriter(CacheWriter):
    """Write a file for each image."""

    @abc.abstractmethod
    def name(self, entry: LatentsEntry) -> str:
        """Return the file's relative path, with "/" between its parts."""

    @abc.abstractmethod
    def data(self, item: CacheEntry) -> bytes:
        """Return the file's content, equal for equal latents."""


class Shard(NamedTuple):
    """Name a file and the indices of the images in it."""

    name: str
    indices: Sequence[int]


class ShardCacheWriter(CacheWriter):
    """Write files that images share."""

    may_lack_images: ClassVar[bool]
    """True if images that cannot be read may be left out of a shard."""
    shard_pattern: ClassVar[str]
    """Glob pattern of the files in the folder that the program takes for shards."""

    @abc.abstractmethod
    def shards(self) -> list[Shard]:
        """Divide the images among files."""

    @abc.abstractmethod
    def write(self, path: Path, items: Iterator[CacheEntry]) -> None:
        """Write one shard to a temporary path; it is renamed afterwards."""

    def last(self) -> list[tuple[str, bytes]]:
        """Return names and contents of files that follow from all shards."""
        return []

    def shards_of(self, pattern: str, images: int) -> list[Shard]:
        """Divide the images in order, `options.shard_images` or else `images` to a file; `pattern` takes its number."""
        everything, images = range(len(self.latents)), self.options.shard_images or images
        return [
            Shard(pattern.format(number), everything[start : start + images])
            for number, start in enumerate(everything[::images])
        ]


class StoredImage(NamedTuple):
    """Hold what a cache stores of one image: raw tensors (z, h, w) float32."""

    mean: torch.Tensor
    """The mean, or the draw where the cache holds a single draw."""
    logvar: torch.Tensor | None = None
    mean_flip: torch.Tensor | None = None
    logvar_flip: torch.Tensor | None = None
    origin: Origin | None = None
    size: tuple[int, int] | None = None
    """Width and height in pixels, if the cache says so without `origin`."""


class FoundImage(NamedTuple):
    """Name one image of a cache and load it."""

    path: str
    """Path of the image, where its `origin` does not say."""
    load: Callable[[], StoredImage]
    """Raises `OSError`, `ValueError`, `KeyError` or `UserError` for damaged content."""


class CacheFormat(NamedTuple):
    """Join the writer and the reader of a format."""

    writer: type[CacheWriter]
    read: Callable[[Path, CacheOptions, Scaling], Iterator[FoundImage]]
    """Takes the cache's folder or file, the options, and the scaling of the latents in it."""


def images_in_files(folder: Path, suffix: str, load: Callable[[Path], StoredImage]) -> Iterator[FoundImage]:
    """Find an image for each file below a folder whose name ends in `suffix`; its path is the file's without it."""
    for path in sorted(folder.rglob(f"*{suffix}")):
        name = path.relative_to(folder).as_posix().removesuffix(suffix)
        yield FoundImage(name, functools.partial(load, path))
