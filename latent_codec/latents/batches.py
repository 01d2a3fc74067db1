"""Make batches of equal shape as a pure function of (seed, epoch, rank, world, position).
The sampler has no random state, so an interrupted epoch resumes at any batch."""

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import BatchSampler

from latent_codec.errors import UserError
from latent_codec.noise import fold, permutation

_IMAGES, _BATCHES = range(2)  # what a key is used for


class BatchIndices(NamedTuple):
    """Name the items of a batch and their epoch, so that persistent workers draw that epoch's noise."""

    indices: tuple[int, ...]
    epoch: int


class ShapeBatches(BatchSampler):
    """Sample an epoch's batches for one of `world` ranks: up to `batch_size` items of one shape each, shuffled.

    Give it to a `DataLoader` as `batch_sampler` (the loader collates the items) or, which copies less, as `sampler`
    with `batch_size=None` (the dataset makes the batch). Each pass has the next epoch, unless `set_epoch` chose one.

    For `accelerator.prepare` give it as `batch_sampler` and without `rank` and `world`: accelerate divides the batches.

    `shapes` has one element for each item. Over all ranks an epoch has every item once; what is left of a shape makes a
    smaller batch. So that every rank has equally many batches, the epoch's first ones are repeated at its end. With
    `drop_last` both smaller batches and the incomplete last round are left out. Raises `UserError` if no batch is left.
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
        self.size, self.seed, self.rank, self.world, self.drop_last = batch_size, seed, rank, world, drop_last
        self.epoch = self.position = 0
        self._begun = False  # whether the epoch is that of a pass
        numbers: dict[Hashable, int] = {}
        self._shape = torch.tensor([numbers.setdefault(shape, len(numbers)) for shape in shapes], dtype=torch.int64)
        counts = torch.bincount(self._shape, minlength=1)
        batches = int((counts // batch_size if drop_last else -(-counts // batch_size)).sum())
        self.batches = batches // world if drop_last else -(-batches // world)
        """Number of batches of one rank in a whole epoch."""
        if not self.batches:
            raise UserError(
                f"{len(shapes)} items of {len(numbers)} shapes make no batch of {batch_size} for each of {world} "
                "ranks; give a smaller batch size"
            )

    @property
    def batch_size(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return None: batches differ in size, and accelerate, which asks, then hands them out whole.

        Raises `UserError` if they are divided among ranks already, since accelerate would divide them again.
        """
        if self.world > 1:
            raise UserError(
                f"ShapeBatches(rank={self.rank}, world={self.world}) divides the batches among {self.world} ranks, and "
                "accelerate would divide them again; leave out rank and world, or do not prepare the loader"
            )

    @property
    def sampler(self) -> "ShapeBatches":  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return itself: accelerate tells the epoch to a batch sampler's sampler."""
        return self

    def set_epoch(self, epoch: int, position: int = 0) -> None:
        """Choose the epoch of the next pass, which skips the rank's first `position` batches to resume there."""
        if not 0 <= position <= self.batches:
            raise UserError(f"position {position} is outside an epoch of {self.batches} batches")
        self.epoch, self.position, self._begun = epoch, position, False

    def __len__(self) -> int:
        return self.batches - self.position

    def __iter__(self) -> Iterator[BatchIndices]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._begun:
            self.epoch, self.position = self.epoch + 1, 0
        self._begun, epoch = True, self.epoch
        for indices in self._epoch_of_all_ranks(epoch)[self.rank :: self.world][self.position :]:
            yield BatchIndices(tuple(indices.tolist()), epoch)

    def _epoch_of_all_ranks(self, epoch: int) -> list[torch.Tensor]:
        order = permutation(len(self._shape), fold(self.seed, epoch, _IMAGES))
        order = order[torch.argsort(self._shape[order], stable=True)]  # by shape, in random order within one
        batches: list[torch.Tensor] = []
        for same in order.split(torch.bincount(self._shape).tolist()):
            batches += same.split(self.size)
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.size]
        chosen = permutation(len(batches), fold(self.seed, epoch, _BATCHES)).tolist()
        return [batches[chosen[i % len(chosen)]] for i in range(self.batches * self.world)]
