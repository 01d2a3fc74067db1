"""The entropy coder: integers <-> bytes under integer frequency tables, by asymmetric numeral systems (Duda 2013).

constriction does the work. Its arithmetic on these tables is exact: it is given frequencies less one as probabilities,
whose sum is 2^24 less their number, so that its own scaling is by 1 and gives each symbol its one back. The format is
in docs/bitstream.md, and the tests decode it a second time without constriction.
"""

import functools
import itertools
from typing import Any

import constriction
import numpy as np

from latent_codec.errors import UserError
from latent_codec.prior.tables import Tables

_START = np.array([0x4C430D0A, 1], np.uint32)
"""The state before the first symbol is coded, low word first; a decoder must find it again after the last one."""

_RAW_OFFSET = 2**15
"""Values outside their table follow as 16 equally likely bits of the value plus this."""

_STREAM: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]
_ANS, _MODEL = _STREAM.stack.AnsCoder, _STREAM.model
_UNIFORM = _MODEL.Uniform(2**16)


class Coder:
    """Codes under one set of tables; the models that constriction makes of them are kept."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self._model = functools.cache(self._make_model)

    def _make_model(self, table: int) -> Any:
        frequencies = self.tables.frequencies(table) - 1
        return _MODEL.Categorical(frequencies.astype(np.float32), perfect=False, lazy=False)

    def encode(self, passes: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
        """Bytes for passes of (values, tables), both (n,) int, in the order in which they will be decoded."""
        coder = _ANS(_START)
        for values, tables in reversed(passes):
            self._push(coder, values, tables)
        return coder.get_compressed().astype("<u4").tobytes()

    def _push(self, coder: Any, values: np.ndarray, tables: np.ndarray) -> None:
        symbols, escaped = self.tables.symbols(values, tables)
        if escaped.any():
            coder.encode_reverse((values[escaped] + _RAW_OFFSET).astype(np.int32), _UNIFORM)
        order, runs = _by_table(tables)
        symbols = symbols[order]
        for table, start, stop in reversed(runs):
            coder.encode_reverse(symbols[start:stop], self._model(table))

    def decoder(self, payload: bytes) -> "Decoder":
        return Decoder(self, payload)


class Decoder:
    """Reads one payload, pass by pass."""

    def __init__(self, coder: Coder, payload: bytes) -> None:
        """Raises `UserError` if the payload cannot be one."""
        words = np.frombuffer(payload, "<u4").astype(np.uint32) if len(payload) % 4 == 0 else np.zeros(0, np.uint32)
        if len(words) < 2 or words[-1] == 0:
            raise UserError("damaged: the coded data do not end as they should")
        self._coder, self._ans = coder, _ANS(words)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """The next pass' values, (n,) int32, coded under tables (n,); raises `UserError` if the data ran out."""
        order, runs = _by_table(tables)
        symbols = np.empty(len(tables), np.int32)
        ans, model = self._ans, self._coder._model
        for table, start, stop in runs:
            symbols[order[start:stop]] = ans.decode(model(table), stop - start)
        values, escaped = self._coder.tables.values(symbols, tables)
        if escaped.any():
            values[escaped] = ans.decode(_UNIFORM, int(escaped.sum())) - _RAW_OFFSET
            if not self._coder.tables.symbols(values[escaped], tables[escaped])[1].all():
                raise UserError("damaged: the coded data say in a long way what has a short one")
        if ans.num_words() < 2:  # a sound state is never below 2^32
            raise UserError("damaged: the coded data ran out")
        return values

    def finish(self) -> None:
        """Raise `UserError` unless the state is the one that encoding began with, and nothing is left."""
        if not np.array_equal(self._ans.get_compressed(), _START):
            raise UserError("damaged: the coded data do not begin as they should")


def _by_table(tables: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """A stable order by table, and its runs (table, start, stop), ascending; none for the empty pass of a 1x1 image."""
    order = np.argsort(tables, kind="stable")
    ordered = tables[order]
    edges = [0, *(np.flatnonzero(np.diff(ordered)) + 1).tolist(), len(tables)] if len(tables) else []
    return order, [(int(ordered[a]), a, b) for a, b in itertools.pairwise(edges)]
