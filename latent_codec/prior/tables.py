"""Hold frequency tables of integers: all that the entropy coder knows of a probability."""

import math

import numpy as np

TOTAL_BITS = 24
TOTAL = 2**TOTAL_BITS
"""Sum of each table's frequencies."""

MAX_FREQUENCY = TOTAL - 2**14
"""Every symbol costs something, so that a small file cannot stand for a huge image."""

MIN_SYMBOL_BITS = -math.log2(MAX_FREQUENCY / TOTAL)
"""Cost of the cheapest symbol, in bits."""

_LARGEST = 2**15  # magnitude of an integer in a table: what the 16 bits after an escape can say


class Tables:
    """Hold frequencies of consecutive integers; each table's last symbol is the escape, which stands for all others.

    counts: all frequencies, table after table, int32; sizes: (t,) symbols of each table, the escape included; first:
    (t,) the integer that each table's first symbol stands for. Raises `ValueError` unless every table sums to `TOTAL`
    and has frequencies from 1 to `MAX_FREQUENCY`.
    """

    def __init__(self, counts: np.ndarray, sizes: np.ndarray, first: np.ndarray) -> None:
        self.counts, self.sizes, self.first = (np.asarray(a, np.int32) for a in (counts, sizes, first))
        if self.sizes.ndim != 1 or self.sizes.shape != self.first.shape or not len(self.sizes) or self.sizes.min() < 2:
            raise ValueError("frequency tables need one size of 2 or more and one first value each")
        if self.first.min() < -_LARGEST or (self.first.astype(np.int64) + self.sizes).max() > _LARGEST + 1:
            raise ValueError(f"a frequency table reaches beyond {-_LARGEST} .. {_LARGEST}")
        self._start = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        if self.counts.shape != (int(self.sizes.sum(dtype=np.int64)),):
            raise ValueError(f"{self.counts.size} frequencies do not fit tables of {int(self.sizes.sum())} symbols")
        if self.counts.min() < 1 or self.counts.max() > MAX_FREQUENCY:
            raise ValueError(f"a frequency is outside 1 .. {MAX_FREQUENCY}")
        if (np.add.reduceat(self.counts, self._start, dtype=np.int64) != TOTAL).any():
            raise ValueError(f"a table's frequencies do not sum to {TOTAL}")

    def __len__(self) -> int:
        return len(self.sizes)

    def frequencies(self, table: int) -> np.ndarray:
        """Return the frequencies of one table, int32."""
        start = self._start[table]
        return self.counts[start : start + self.sizes[table]]

    def symbols(self, values: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the symbols (n,) int32 of values (n,) under tables (n,), and a mask of those that are escapes."""
        symbols = values - self.first[tables]
        last = self.sizes[tables] - 1
        escaped = (symbols < 0) | (symbols >= last)
        return np.where(escaped, last, symbols).astype(np.int32), escaped

    def values(self, symbols: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Invert `symbols`: return the values and the mask of escapes, whose values are still unknown."""
        return symbols + self.first[tables], symbols == self.sizes[tables] - 1

    def bits(self, values: np.ndarray, tables: np.ndarray) -> np.ndarray:
        """Return the ideal code length of each value, (n,) float64, with the 16 raw bits of an escape."""
        symbols, escaped = self.symbols(values, tables)
        return TOTAL_BITS - np.log2(self.counts[self._start[tables] + symbols]) + 16 * escaped


def normalize(weights: np.ndarray) -> np.ndarray:
    """Return frequencies (n,) int32 in proportion to positive weights (n >= 2), within the limits of `Tables`."""
    weights = np.asarray(weights, np.float64)
    counts = 1 + np.floor(weights / weights.sum() * (TOTAL - len(weights))).astype(np.int64)
    counts = np.minimum(counts, MAX_FREQUENCY - len(weights))
    missing = TOTAL - int(counts.sum())
    for i in np.argsort(-weights, kind="stable"):  # the likeliest symbols get what rounding and the cap left over
        more = min(missing, MAX_FREQUENCY - int(counts[i]))
        counts[i], missing = counts[i] + more, missing - more
    assert missing == 0
    return counts.astype(np.int32)


def join(tables: list[tuple[int, np.ndarray]]) -> Tables:
    """Return `Tables` made of (first value, frequencies) pairs."""
    return Tables(
        np.concatenate([counts for _, counts in tables]),
        np.array([len(counts) for _, counts in tables]),
        np.array([first for first, _ in tables]),
    )
