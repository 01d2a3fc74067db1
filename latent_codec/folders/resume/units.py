"""What a command will do, settled before it does anything: where each output goes, and the work cut into units.

A unit is what one process does at a time: neighbours in the sorted list of sources. Batches are made within a unit, so
what an image is computed with, and to the last bit what comes of it, depends on the sources alone: not on the number
of processes, nor on interruptions.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images.sources import Source

_MEAN_IMAGES = 128
_MOST_IMAGES = 512
_MOST_BYTES = 2**26


class Unit(NamedTuple):
    name: str
    """Of its first source's name; other units have others."""
    sources: tuple[Source, ...]


def units(sources: Sequence[Source]) -> list[Unit]:
    """Sorted sources in units.

    A unit begins where a name's hash says so, or where the one before has become large: a new file among many changes
    the unit that it falls into and leaves the others as they are.
    """
    found: list[list[Source]] = []
    size = 0
    for source in sources:
        begins = _digest(source.name) % _MEAN_IMAGES == 0
        if not found or begins or len(found[-1]) >= _MOST_IMAGES or size >= _MOST_BYTES:
            found.append([])
            size = 0
        found[-1].append(source)
        size += source.size
    return [Unit(f"{_digest(unit[0].name):016x}", tuple(unit)) for unit in found]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several processes, and whether it takes up what others leave undone."""

    index: int
    count: int
    alone: bool
    """Do own units only: the other processes may write elsewhere."""

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From `i/n`, i from 0 to n - 1; raises `UserError` for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/4 to 3/4 for four processes")
        return cls(int(index), int(count), alone=True)

    @classmethod
    def of_launcher(cls) -> "Share":
        """By the rank that `accelerate launch` or torchrun gave this process; the whole without one."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise UserError(f"RANK {rank} of WORLD_SIZE {size} in the environment makes no sense; unset both")
        return cls(int(rank), int(size), alone=False)

    def of(self, everything: Sequence[Unit]) -> list[Unit]:
        """The units that are this process' to do, its own first."""
        own = list(everything[self.index :: self.count])
        others = [] if self.alone else [u for i, u in enumerate(everything) if i % self.count != self.index]
        return own + others


WHOLE = Share(0, 1, alone=True)
