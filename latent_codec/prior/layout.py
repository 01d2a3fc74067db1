"""Describe which latents each pass of a prior codes, and gather the neighbourhoods that its predictions read."""

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch


class Sites(enum.Enum):
    """Select the positions of a grid that one pass codes; the grid's rows and columns count from 0."""

    EVEN = "row + column even"
    ODD = "row + column odd"
    CENTRES = "row and column odd"
    ALL = "all"

    def mask(self, size: Sequence[int]) -> np.ndarray:
        """Return these sites of a grid of `size` (h, w) as (h, w) bool."""
        if self is Sites.ALL:
            return np.ones(tuple(size), bool)
        row, column = np.arange(size[0])[:, None] % 2, np.arange(size[1]) % 2
        masks = {Sites.EVEN: row == column, Sites.ODD: row != column, Sites.CENTRES: (row & column) == 1}
        return masks[self]


class PassLayout(NamedTuple):
    """Describe the latents that one pass codes: channels `start` to `stop` of the prior's order, at `sites` of a grid.
    The grid consists of every `spacing`-th row and column of the latents."""

    start: int
    stop: int
    sites: Sites
    spacing: int = 1

    @property
    def inputs(self) -> int:
        """Return how many channels the pass' network reads; its own only if some of their sites are known by then."""
        return self.stop if self.sites in (Sites.ODD, Sites.CENTRES) else self.start

    @property
    def view(self) -> int:
        """Return the spacing at which the network sees the latents.
        In the first group that is the pass' grid, as nothing else is known; later groups see all positions."""
        return 1 if self.start else self.spacing

    def mask(self, size: Sequence[int]) -> np.ndarray:
        """Return the pass' positions among all of a size (h, w) as (h, w) bool."""
        found = np.zeros(tuple(size), bool)
        grid = found[:: self.spacing, :: self.spacing]
        grid[:] = self.sites.mask(grid.shape)
        return found

    def take(self, latents: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return the pass' values (b, g, n) of latents (b, z, h, w), by channel in `order` (z,), row and column."""
        grid = latents[:, self._channels(order), :: self.spacing, :: self.spacing]
        if self.sites is Sites.ALL:  # the same, but faster
            return grid.reshape(*grid.shape[:2], -1)
        return grid[:, :, self.sites.mask(grid.shape[2:])]

    def put(self, latents: np.ndarray, order: np.ndarray, values: np.ndarray) -> None:
        """Write values (b, g, n), as `take` returns them, into latents (b, z, h, w)."""
        grid = latents[:, :, :: self.spacing, :: self.spacing]
        if self.sites is Sites.ALL:
            grid[:, self._channels(order)] = values.reshape(*values.shape[:2], *grid.shape[2:])
        else:
            rows, columns = np.nonzero(self.sites.mask(grid.shape[2:]))
            grid[:, order[self.start : self.stop, None], rows, columns] = values

    def _channels(self, order: np.ndarray) -> np.ndarray | slice:
        """Return the pass' channels, if possible as a slice, which copies nothing."""
        own = order[self.start : self.stop]
        return slice(own[0], own[-1] + 1) if (np.diff(own) == 1).all() else own


class Prediction(NamedTuple):
    """Hold what a prior knows of a pass' values before they are decoded, (b, g, n) int64 each in the order of `take`.
    A value is (coded integer + centre) * FINE + offset, in fine units."""

    offset: np.ndarray
    centre: np.ndarray
    table: np.ndarray
    """Number of the frequency table that the coded integer is coded under."""


def strips(size: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yield (top, bottom) of strips of rows that cover (b, h, w) positions, each at most `limit` or one row large."""
    b, h, w = size
    rows = max(1, limit // (b * w))
    for top in range(0, h, rows):
        yield top, min(top + rows, h)


def patches(x: torch.Tensor, sites: torch.Tensor | None = None) -> torch.Tensor:
    """Return the 3x3 neighbourhoods (b, n, 9 * c) of padded x (b, h + 2, w + 2, c) at sites (h, w) bool, or at all."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    corner = torch.arange(h)[:, None] * (w + 2) + torch.arange(w)  # (h, w) of each position's upper left neighbour
    if sites is not None:
        corner = corner[sites]
    shift = torch.arange(3)[:, None] * (w + 2) + torch.arange(3)  # (3, 3)
    index = (corner.reshape(-1, 1) + shift.reshape(1, -1)).reshape(-1).to(x.device)  # (n * 9,)
    return x.flatten(1, 2).index_select(1, index).unflatten(1, (-1, 9)).flatten(2)
