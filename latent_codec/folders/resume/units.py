"""Cut the work of a command into units, and share them among processes.

A unit is the atom of the work: neighbours in the sorted list of sources, which are up to date together or made again
together, by one process. As batches are formed within a unit, an image's result depends on the sources alone.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images.sources import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitSizes:
    """Choose how large units are; files of latents and tar shards hold one unit each."""

    mean_images: int = 128
    """A name begins a unit with probability 1 / mean_images."""
    most_images: int = 512
    most_bytes: int = 2**26
    """Bytes of sources after which the next source begins a unit."""


DEFAULT_SIZES = UnitSizes()


class Unit(NamedTuple):
    """Hold neighbouring sources that are made together."""

    name: str
    """Hash of its first source's name, 16 hex digits."""
    sources: tuple[Source, ...]

    @property
    def place(self) -> str:
        """Return a digest of where the sources are searched, which tells sets of images with equal names apart."""
        name, path = self.sources[0].name, str(self.sources[0].path)
        root = path.removesuffix(name) if path.endswith(f"/{name}") else os.path.dirname(path)  # noqa: PTH120
        return f"{_digest(os.path.realpath(root)):016x}"


def units(sources: Sequence[Source], sizes: UnitSizes = DEFAULT_SIZES) -> list[Unit]:
    """Cut sorted sources into units where a name's hash says so or one has become large: a new file changes one."""
    found: list[list[Source]] = []
    size = 0
    for source in sources:
        begins = _digest(source.name) % sizes.mean_images == 0
        if not found or begins or len(found[-1]) >= sizes.most_images or size >= sizes.most_bytes:
            found.append([])
            size = 0
        found[-1].append(source)
        size += source.size
    return [Unit(f"{_digest(unit[0].name):016x}", tuple(unit)) for unit in found]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


@dataclasses.dataclass(frozen=True)
class Share:
    """Say which of several processes this is, and whether it does what the others leave undone."""

    index: int
    count: int
    alone: bool
    """Do own units only: the other processes may write elsewhere."""

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read `i/n`, i from 0 to n - 1; raises `UserError` for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/4 to 3/4 for four processes")
        return cls(int(index), int(count), alone=True)

    @classmethod
    def of_launcher(cls) -> "Share":
        """Return the share of the launcher's rank, or the whole; raises `UserError` if RANK contradicts WORLD_SIZE."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise UserError(f"RANK {rank} of WORLD_SIZE {size} in the environment makes no sense; unset both")
        return cls(int(rank), int(size), alone=False)

    def of(self, everything: Sequence[Unit]) -> list[Unit]:
        """Return the units that this process does, its own first, then the others unless it is `alone`."""
        own = list(everything[self.index :: self.count])
        others = [] if self.alone else [u for i, u in enumerate(everything) if i % self.count != self.index]
        return own + others


WHOLE = Share(0, 1, alone=True)
