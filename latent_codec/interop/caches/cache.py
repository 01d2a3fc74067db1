"""What goes into a cache and what comes out of one: an image's posterior, and who it is of."""

import abc
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from latent_codec.images.geometry import Geometry
from latent_codec.interop.caches.options import Options
from latent_codec.latents.batches import BatchIndices
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import normal
from latent_codec.storage.json_config import from_json, to_json

PIXELS = (-1.0, 1.0)
"""Range of pixels that most consumers' autoencoders take and give."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """Whose latents these are. It travels beside them wherever a format has room for what its readers pass over."""

    model_id: str
    path: str
    geometry: Geometry
    sha256: str
    """Of the source file."""

    def text(self) -> str:
        """JSON in ASCII: a name that is not valid UTF-8 survives."""
        return json.dumps(to_json(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> "About":
        """Raises `ValueError`."""
        return from_json(cls, json.loads(text), where="latent_codec")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One image's latents, on their way into a cache."""

    entry: LatentsEntry
    about: About
    label: int
    """-1 without one."""
    posterior: DiagonalGaussian  # of (1, z, h, w), as is the other
    mirrored: DiagonalGaussian | None
    noise: torch.Tensor  # (1, z, h, w)
    bytes_in: int
    """That it was stored in."""

    @property
    def z(self) -> torch.Tensor:
        """The draw, raw, (z, h, w) float32: that of `Latents` with the same seed and epoch."""
        return self.posterior.sample(self.noise)[0]

    @property
    def z_flip(self) -> torch.Tensor | None:
        """Of the mirrored image, by the same noise, as `Latents` draws it where it chooses that one."""
        return None if self.mirrored is None else self.mirrored.sample(self.noise)[0]


def read_item(latents: Latents, index: int, epoch: int) -> Item:
    """Raises `UserError`, with the image's name, if its shard is missing or damaged."""
    entry = latents.entries[index]
    moments = latents.moments(BatchIndices((index,), epoch))
    posterior = DiagonalGaussian(moments.mean.float(), moments.logvar.float())  # (1, z, h, w)
    mirrored = latents.posterior(index, flip=True) if latents.header.flips else None
    return Item(
        entry=entry,
        about=About(model_id=latents.header.model_id, path=entry.path, geometry=entry.geometry, sha256=entry.sha256),
        label=int(moments.labels[0]),
        posterior=posterior,
        mirrored=mirrored,
        noise=normal(moments.keys, tuple(posterior.mean.shape[1:])),
        bytes_in=(moments.mean.nbytes + moments.logvar.nbytes) * (1 if mirrored is None else 2),
    )


class Cache(abc.ABC):
    """What one consumer reads, made of latents. `__init__` raises `UserError` if it cannot be made of these."""

    takes: ClassVar[frozenset[str]]
    """Options that make a difference."""

    def __init__(self, latents: Latents, options: Options) -> None:
        self.latents, self.options = latents, options
        self.notes: list[str] = []
        """Sentences for the user."""

    def leave_out_flips(self, name: str) -> None:
        if self.latents.header.flips:
            self.notes.append(f"latents of mirrored images are left out: {name} has no place for them")

    def tell_range(self, consumer: tuple[float, float], name: str) -> None:
        if (own := self.latents.header.pixel_range) != consumer:
            self.notes.append(
                f"the encoder saw pixels in {list(own)}, and {name} takes decoded pixels to be in "
                f"{list(consumer)}: convert them after decoding"
            )


class ImageCache(Cache):
    """A file for each image."""

    @abc.abstractmethod
    def name(self, entry: LatentsEntry) -> str:
        """Of its file, relative, with "/" between its parts."""

    @abc.abstractmethod
    def data(self, item: Item) -> bytes: ...


class Shard(NamedTuple):
    name: str
    indices: Sequence[int]


class ShardCache(Cache):
    """Files that images share."""

    tolerant: ClassVar[bool]
    """Whether images that cannot be read may be missing."""
    mistaken: ClassVar[str]
    """Pattern of files in the folder that the consumer takes for shards."""

    @abc.abstractmethod
    def shards(self) -> list[Shard]: ...

    @abc.abstractmethod
    def write(self, path: Path, items: Iterator[Item]) -> None:
        """One shard; it is renamed afterwards."""

    def last(self) -> list[tuple[str, bytes]]:
        """Files, by name, that follow from all shards."""
        return []


class Stored(NamedTuple):
    """What a cache holds of one image; single draws have no log-variances. All (z, h, w) float32, raw."""

    mean: torch.Tensor
    logvar: torch.Tensor | None
    mean_flip: torch.Tensor | None
    logvar_flip: torch.Tensor | None
    about: About | None
    size: tuple[int, int] | None
    """Width and height in pixels, if the cache says so without `about`."""


class Found(NamedTuple):
    """One image of a cache."""

    path: str
    """Where its `about` does not say."""
    load: Callable[[], Stored]
    """Raises `OSError`, `ValueError`, `KeyError` or `UserError` for what is damaged."""
