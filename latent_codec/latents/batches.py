"""Batches of equal shape as a pure function of (seed, epoch, rank, world, position): no sampler has a state to lose."""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from latent_codec.errors import UserError
from latent_codec.noise import fold, permutation

_IMAGES, _BATCHES = range(2)  # what a key is used for


class Rows(NamedTuple):
    """What a batch is made of; the epoch comes with it, so that workers that outlive an epoch know of the next."""

    indices: tuple[int, ...]
    epoch: int


class ShapeBatches(Sampler[Rows]):
    """An epoch's batches for one of `world` ranks, each of up to `batch_size` items of one shape, in random order.

    Give it to a `DataLoader` as `sampler` with `batch_size=None` (the dataset makes the batch) or as `batch_sampler`
    (the loader collates it). It has shared out the work already: `accelerate` is not to do that again.

    shapes: one for each item. An epoch has every item once, over all ranks: what is left over of a shape makes a
    smaller batch. If the number of batches is not a multiple of `world`, the epoch's first ones are repeated at its
    end, for every rank has equally many. With `drop_last` both are left out instead: an item is there at most once, and
    those of a shape with fewer than `batch_size` never. Raises `UserError` if nothing is left.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world:
            raise UserError(f"batch size {batch_size} must be at least 1, and rank {rank} one of 0 to {world - 1}")
        self.batch_size, self.seed, self.rank, self.world, self.drop_last = batch_size, seed, rank, world, drop_last
        self.epoch = self.position = 0
        numbers: dict[Hashable, int] = {}
        self._shape = torch.tensor([numbers.setdefault(shape, len(numbers)) for shape in shapes], dtype=torch.int64)
        counts = torch.bincount(self._shape, minlength=1)
        batches = int((counts // batch_size if drop_last else -(-counts // batch_size)).sum())
        self.batches = batches // world if drop_last else -(-batches // world)
        """Of one rank in a whole epoch."""
        if not self.batches:
            raise UserError(
                f"{len(shapes)} items of {len(numbers)} shapes make no batch of {batch_size} for each of {world} "
                "ranks; give a smaller batch size"
            )

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """The next iteration gives the batches of this epoch, less the rank's first `position`, to resume there."""
        if not 0 <= position <= self.batches:
            raise UserError(f"position {position} is none of an epoch of {self.batches} batches")
        self.epoch, self.position = epoch, position

    def __len__(self) -> int:
        return self.batches - self.position

    def __iter__(self) -> Iterator[Rows]:
        epoch = self.epoch
        for indices in self._epoch(epoch)[self.rank :: self.world][self.position :]:
            yield Rows(tuple(indices.tolist()), epoch)

    def _epoch(self, epoch: int) -> list[torch.Tensor]:
        """Of all ranks, in turn."""
        order = permutation(len(self._shape), fold(self.seed, epoch, _IMAGES))
        order = order[torch.argsort(self._shape[order], stable=True)]  # by shape, in random order within one
        batches: list[torch.Tensor] = []
        for same in order.split(torch.bincount(self._shape).tolist()):
            batches += same.split(self.batch_size)
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        chosen = permutation(len(batches), fold(self.seed, epoch, _BATCHES)).tolist()
        total = self.batches * self.world
        return [batches[chosen[i % len(chosen)]] for i in range(total)]
