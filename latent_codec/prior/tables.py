"""Integer frequency tables: all that an entropy coder ever knows of a probability."""

import math

import numpy as np

TOTAL_BITS = 24
TOTAL = 2**TOTAL_BITS
"""Sum of every table's frequencies."""

_MOST = TOTAL - 2**14
"""Largest frequency: every symbol costs something, so that a small file cannot stand for a huge image."""

_FARTHEST = 2**15
"""Largest magnitude of an integer in a table: what an escape's 16 bits can say."""

MIN_SYMBOL_BITS = -math.log2(_MOST / TOTAL)
"""The least that any symbol costs, in bits."""


class Tables:
    """Frequencies of consecutive integers; the last symbol of each table is the escape, for all other integers.

    counts: all frequencies, table after table, int32; sizes: (t,) symbols of each table, the escape included; first:
    (t,) the integer that each table's first symbol stands for. Raises `ValueError` unless every table sums to `TOTAL`
    and has frequencies from 1 to `TOTAL` - 2^14.
    """

    def __init__(self, counts: np.ndarray, sizes: np.ndarray, first: np.ndarray) -> None:
        self.counts, self.sizes, self.first = (np.asarray(a, np.int32) for a in (counts, sizes, first))
        if self.sizes.ndim != 1 or self.sizes.shape != self.first.shape or not len(self.sizes) or self.sizes.min() < 2:
            raise ValueError("frequency tables need one size of 2 or more and one first value each")
        if self.first.min() < -_FARTHEST or (self.first.astype(np.int64) + self.sizes).max() > _FARTHEST + 1:
            raise ValueError(f"a frequency table reaches beyond {-_FARTHEST} .. {_FARTHEST}")
        self._start = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        if self.counts.shape != (int(self.sizes.sum(dtype=np.int64)),):
            raise ValueError(f"{self.counts.size} frequencies do not fit tables of {int(self.sizes.sum())} symbols")
        if self.counts.min() < 1 or self.counts.max() > _MOST:
            raise ValueError(f"a frequency is outside 1 .. {_MOST}")
        if (np.add.reduceat(self.counts, self._start, dtype=np.int64) != TOTAL).any():
            raise ValueError(f"a table's frequencies do not sum to {TOTAL}")

    def __len__(self) -> int:
        return len(self.sizes)

    def frequencies(self, table: int) -> np.ndarray:
        start = self._start[table]
        return self.counts[start : start + self.sizes[table]]

    def symbols(self, values: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Symbol numbers (n,) int32 of values under their tables, and which of them are escapes."""
        symbols = values - self.first[tables]
        last = self.sizes[tables] - 1
        escaped = (symbols < 0) | (symbols >= last)
        return np.where(escaped, last, symbols).astype(np.int32), escaped

    def values(self, symbols: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `symbols`; where it was an escape the value is not known yet."""
        return symbols + self.first[tables], symbols == self.sizes[tables] - 1

    def bits(self, values: np.ndarray, tables: np.ndarray) -> float:
        """Ideal code length of values (n,) under tables (n,), the 16 raw bits of each escape included."""
        return float(self.code_lengths(values, tables).sum())

    def code_lengths(self, values: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Of each value apart, (n,) float64."""
        symbols, escaped = self.symbols(values, tables)
        return TOTAL_BITS - np.log2(self.counts[self._start[tables] + symbols]) + 16 * escaped


def normalize(weights: np.ndarray) -> np.ndarray:
    """Frequencies (n,) int32 in proportion to positive weights (n >= 2), as `Tables` wants them."""
    weights = np.asarray(weights, np.float64)
    spare = TOTAL - len(weights)
    counts = 1 + np.floor(weights / weights.sum() * spare).astype(np.int64)
    counts = np.minimum(counts, _MOST - len(weights))
    order = np.argsort(-weights, kind="stable")
    missing = TOTAL - int(counts.sum())
    for i in order:  # what rounding and the cap left over goes to the likeliest that can take it
        more = min(missing, _MOST - int(counts[i]))
        counts[i], missing = counts[i] + more, missing - more
    assert missing == 0
    return counts.astype(np.int32)


def join(tables: list[tuple[int, np.ndarray]]) -> Tables:
    """Tables from (first value, frequencies) each."""
    return Tables(
        np.concatenate([counts for _, counts in tables]),
        np.array([len(counts) for _, counts in tables]),
        np.array([first for first, _ in tables]),
    )
