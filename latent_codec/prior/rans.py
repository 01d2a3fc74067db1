"""Code integers under frequency tables by range asymmetric numeral systems (rANS; Duda 2013).

The library constriction does the work. It gets each frequency less one as a probability: these sum to 2^24 less their
number, so that its own rescaling is the identity and adds the one back to each symbol. Its results are thus exact. The
format is in docs/bitstream.md, and the tests decode it a second time without constriction.
"""

import functools
import itertools
from typing import Any

import constriction
import numpy as np

from latent_codec.errors import UserError
from latent_codec.prior.tables import Tables

_START = np.array([0x4C430D0A, 1], np.uint32)
"""The encoder's initial state, low word first, which a decoder must end in."""

_RAW_OFFSET = 2**15
"""An escaped value follows as 16 equally likely bits, the value plus this."""

_STREAM: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
_ANS, _MODEL = _STREAM.stack.AnsCoder, _STREAM.model
_UNIFORM = _MODEL.Uniform(2**16)

PassSymbols = tuple[np.ndarray, np.ndarray]
"""The integers that a pass codes and the number of each one's table, both (n,) int."""


class Coder:
    """Encode and decode under one set of tables; keep constriction's models of them."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.model = functools.cache(self._make_model)

    def _make_model(self, table: int) -> Any:
        frequencies = self.tables.frequencies(table) - 1
        return _MODEL.Categorical(frequencies.astype(np.float32), perfect=False, lazy=False)

    def encode(self, passes: list[PassSymbols]) -> bytes:
        """Return the payload for passes given in the order in which they will be decoded."""
        coder = _ANS(_START)
        for values, tables in reversed(passes):
            symbols, escaped = self.tables.symbols(values, tables)
            if escaped.any():
                coder.encode_reverse((values[escaped] + _RAW_OFFSET).astype(np.int32), _UNIFORM)
            order, runs = _by_table(tables)
            symbols = symbols[order]
            for table, start, stop in reversed(runs):
                coder.encode_reverse(symbols[start:stop], self.model(table))
        return coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Decode one payload, pass by pass; raise `UserError` if its length or last word cannot be a payload's."""

    def __init__(self, coder: Coder, payload: bytes) -> None:
        words = np.frombuffer(payload, "<u4").astype(np.uint32) if len(payload) % 4 == 0 else np.zeros(0, np.uint32)
        if len(words) < 2 or words[-1] == 0:
            raise UserError("damaged: the coded data do not end as they should")
        self._coder, self._ans = coder, _ANS(words)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """Return the values (n,) int32 of the next pass, coded under tables (n,).
        Raises `UserError` if the data ran out or an escape stands for a value that its table holds."""
        order, runs = _by_table(tables)
        symbols = np.empty(len(tables), np.int32)
        for table, start, stop in runs:
            symbols[order[start:stop]] = self._ans.decode(self._coder.model(table), stop - start)
        values, escaped = self._coder.tables.values(symbols, tables)
        if escaped.any():
            values[escaped] = self._ans.decode(_UNIFORM, int(escaped.sum())) - _RAW_OFFSET
            if not self._coder.tables.symbols(values[escaped], tables[escaped])[1].all():
                raise UserError("damaged: the coded data have a non-canonical escape code")
        if self._ans.num_words() < 2:  # a sound state is never below 2^32
            raise UserError("damaged: the coded data ran out")
        return values

    def finish(self) -> None:
        """Raise `UserError` unless the decoder is in the encoder's initial state with nothing left to read."""
        if not np.array_equal(self._ans.get_compressed(), _START):
            raise UserError("damaged: the coded data do not begin as they should")


def _by_table(tables: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Return a stable order by table and its runs (table, start, stop), ascending; an empty pass has none."""
    small = tables.astype(np.int16) if len(tables) and tables.max() < 2**15 else tables  # sorted by digits
    order = np.argsort(small, kind="stable")
    ordered = tables[order]
    edges = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(tables)] if len(tables) else []
    return order, [(int(ordered[a]), a, b) for a, b in itertools.pairwise(edges)]
