"""The factorised prior: each latent on its own, by its channel's table for the step's quarter octave.

A codebook's indices are whole numbers already: they have one table.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from latent_codec.prior.quantizer import LIMIT, octave_eighths, scale, step_code, to_integers
from latent_codec.prior.tables import Tables, join, normalize

_FIRST_EIGHTH, _LAST_EIGHTH = -16, 40  # steps of 1/4 to 32; beyond them the nearest tables serve
LEVELS = (_LAST_EIGHTH - _FIRST_EIGHTH) // 2 + 1


def level(step: int) -> int:
    """Which tables a stored step takes, 0 to `LEVELS` - 1: those made for its eighth of an octave or the one below."""
    eighth = min(max(octave_eighths(step), _FIRST_EIGHTH), _LAST_EIGHTH)
    return (eighth - _FIRST_EIGHTH) // 2


def level_step(level: int) -> float:
    """The step that a level's tables are made for."""
    return 2.0 ** ((_FIRST_EIGHTH + 2 * level) / 8)


class FactorizedPrior:
    """Table level * channels + c for channel c; one pass, symbols in order (z, h, w). Of `codes`, one table for all."""

    kind: Literal["factorized"] = "factorized"
    version = 1
    """Of the streams coded under it."""

    def __init__(self, channels: int, codes: int | None, tables: Tables) -> None:
        if codes is None and len(tables) != LEVELS * channels:
            raise ValueError(f"{len(tables)} tables do not fit {LEVELS} levels of {channels} channels")
        if codes is not None and (tables.sizes.tolist(), tables.first.tolist()) != ([codes + 1], [0]):
            raise ValueError(f"the indices of {codes} codes have one table, which holds exactly them")
        self.channels, self.codes, self.tables = channels, codes, tables

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer that a stream may hold."""
        return (-LIMIT, LIMIT) if self.codes is None else (0, self.codes - 1)

    def select(self, step: int, shape: tuple[int, int, int]) -> np.ndarray:
        """The tables of all symbols of one image, (z * h * w,) int64."""
        if self.codes is not None:
            return np.zeros(shape[1] * shape[2], np.int64)
        return np.repeat(level(step) * self.channels + np.arange(self.channels), shape[1] * shape[2])


_KEPT = 1e-5  # share of the values, at either end, that may be left to the escape


def fit(means: torch.Tensor, channel_steps: np.ndarray) -> FactorizedPrior:
    """Tables from posterior means (z, n) of a calibration set, rounded at each level's step; `channel_steps`: (z,).

    Raises `UserError` as `quantizer.scale` does.
    """
    tables: list[tuple[int, np.ndarray]] = []
    for i in range(LEVELS):
        latents = scale(means[:, None], channel_steps, step_code(level_step(i)), None).latents[:, 0]
        values = to_integers(latents, np.zeros(()), np.zeros((), bool))
        tables += _level_tables(values)
    return FactorizedPrior(len(means), None, join(tables))


def fit_codes(counts: np.ndarray) -> FactorizedPrior:
    """The table of a codebook from how often each code was seen (K,); half a count more for each and the escape."""
    return FactorizedPrior(1, len(counts), join([(0, normalize(np.r_[counts + 0.5, 0.5]))]))


def _level_tables(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for channel in values:
        ordered = np.sort(channel)
        outside = int(_KEPT * len(ordered))
        low, high = int(ordered[outside]), int(ordered[-1 - outside])
        counts = np.bincount((ordered - low)[(ordered >= low) & (ordered <= high)], minlength=high - low + 1)
        # Half a count each, for what was not seen.
        yield low, normalize(np.r_[counts + 0.5, 2 * outside + 0.5])
