"""Code each latent independently, under a table for its channel and the step's quarter octave.
The indices of a codebook are integers already: one table serves them all."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from latent_codec.prior.layout import PassLayout, Prediction, Sites
from latent_codec.prior.quantizer import LIMIT, BatchSettings, scale, step_code, to_integers
from latent_codec.prior.tables import Tables, join, normalize

_FIRST_EIGHTH, _LAST_EIGHTH = -16, 40  # steps of 1/4 to 32; the nearest tables serve those beyond
QUARTER_OCTAVES = (_LAST_EIGHTH - _FIRST_EIGHTH) // 2 + 1


class FactorizedPrior:
    """Code all latents in one pass, in order (z, h, w); channel c has table quarter octave * channels + c.
    With `codes`, a codebook's size, there is one channel and one table. Raises `ValueError` if tables do not fit."""

    kind: Literal["factorized"] = "factorized"
    version = 1  # format version of the streams coded under this prior

    def __init__(self, channels: int, codes: int | None, tables: Tables) -> None:
        if codes is None and len(tables) != QUARTER_OCTAVES * channels:
            raise ValueError(f"{len(tables)} tables do not fit {QUARTER_OCTAVES} steps of {channels} channels")
        if codes is not None and (tables.sizes.tolist(), tables.first.tolist()) != ([codes + 1], [0]):
            raise ValueError(f"the indices of {codes} codes need one table that holds exactly them")
        self.channels, self.codes, self.tables = channels, codes, tables
        self.order, self.layouts = np.arange(channels), [PassLayout(0, channels, Sites.ALL)]
        self.limits = (-LIMIT, LIMIT) if codes is None else (0, codes - 1)
        """The least and the largest integer that a stream may hold."""

    def predict(self, number: int, known: np.ndarray, batch: BatchSettings, device: str) -> Prediction:
        """Return the tables of all latents, as `ContextPrior.predict` does; nothing but the settings matters."""
        offset = batch.dithers.reshape(*batch.dithers.shape[:2], -1)  # (b, z, h * w)
        quarter_octaves = (np.clip(batch.octaves, _FIRST_EIGHTH, _LAST_EIGHTH) - _FIRST_EIGHTH) // 2  # (b,)
        first = quarter_octaves * self.channels if self.codes is None else np.zeros_like(quarter_octaves)
        tables = first[:, None, None] + np.arange(self.channels)[:, None]
        return Prediction(offset, np.zeros((1, 1, 1), np.int64), np.broadcast_to(tables, offset.shape))


_OUTSIDE = 1e-5  # share of the values, at either end, that a table may leave to its escape


def fit(means: torch.Tensor, channel_steps: np.ndarray) -> FactorizedPrior:
    """Count tables from posterior means (z, n) of a calibration set, rounded at the step of each quarter octave.
    `channel_steps`: (z,) float32. Raises `UserError` as `quantizer.scale` does."""
    tables: list[tuple[int, np.ndarray]] = []
    for i in range(QUARTER_OCTAVES):
        step = step_code(2.0 ** ((_FIRST_EIGHTH + 2 * i) / 8))
        latents = scale(means[:, None], channel_steps, step, None).latents[:, 0]
        tables += _count(to_integers(latents, np.zeros(()), np.zeros((), bool)))
    return FactorizedPrior(len(means), None, join(tables))


def fit_codes(counts: np.ndarray) -> FactorizedPrior:
    """Return a prior of codebook indices from how often each code was seen (K,), plus half a count for each."""
    return FactorizedPrior(1, len(counts), join([(0, normalize(np.r_[counts + 0.5, 0.5]))]))


def _count(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each channel's (first value, frequencies) from integers (z, n), plus half a count for each."""
    for channel in values:
        ordered = np.sort(channel)
        outside = int(_OUTSIDE * len(ordered))
        low, high = int(ordered[outside]), int(ordered[-1 - outside])
        counts = np.bincount((ordered - low)[(ordered >= low) & (ordered <= high)], minlength=high - low + 1)
        yield low, normalize(np.r_[counts + 0.5, 2 * outside + 0.5])
