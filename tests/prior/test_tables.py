"""Every table sums to its total in integers, and every integer has a symbol."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.prior.tables import MAX_FREQUENCY, TOTAL, Tables, join, normalize
from tests.support.errors import rejected

weights = st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=40).map(np.array)


@given(weights, st.integers(-10, 10))
def test_frequencies_follow_their_weights_and_sum_to_the_total(w: np.ndarray, octave: int) -> None:
    counts, share = normalize(w), w / w.sum()
    join([(0, counts)])  # which checks the sum and the bounds
    np.testing.assert_array_equal(normalize(w * 2.0**octave), counts)  # the scale of weights does not matter
    order = np.argsort(-w, kind="stable")
    assert (np.diff(counts[order]) <= 0).all()
    if share.max() * TOTAL < MAX_FREQUENCY - len(w):  # else the cap moves some
        assert (counts[order[1:]] / TOTAL <= share[order[1:]] + 1 / TOTAL).all()
        assert np.abs(counts / TOTAL - share).max() <= (len(w) + 2) / TOTAL


@given(st.lists(st.tuples(st.integers(-(2**15), 2**15 - 40), weights), min_size=1, max_size=5), st.data())
def test_symbols_and_values_are_inverse_save_escapes(parts: list[tuple[int, np.ndarray]], data: st.DataObject) -> None:
    tables = join([(first, normalize(w)) for first, w in parts])
    assert len(tables) == len(parts)
    chosen = np.array(data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=20)))
    offsets = np.array(data.draw(st.lists(st.integers(-2, 42), min_size=len(chosen), max_size=len(chosen))))
    values = tables.first[chosen] + offsets
    symbols, escaped = tables.symbols(values, chosen)
    assert (symbols >= 0).all() and (symbols < tables.sizes[chosen]).all()
    back, unknown = tables.values(symbols, chosen)
    np.testing.assert_array_equal(unknown, escaped)
    np.testing.assert_array_equal(back[~escaped], values[~escaped])
    np.testing.assert_array_equal((offsets >= 0) & (offsets < tables.sizes[chosen] - 1), ~escaped)
    frequencies = [int(tables.frequencies(t)[s]) for t, s in zip(chosen, symbols, strict=True)]
    expected = [24 - math.log2(f) + 16 * e for f, e in zip(frequencies, escaped, strict=True)]
    np.testing.assert_allclose(tables.bits(values, chosen), expected)


HALF = TOTAL // 2
TWO = [HALF, HALF]
UNSOUND: dict[str, list[tuple[list, list, list]]] = {
    "need one size": [(TWO, [], []), (TWO, [[2]], [[0]])],
    "one first value each": [(TWO, [2], [0, 0])],
    "2 or more": [([MAX_FREQUENCY, TOTAL - MAX_FREQUENCY, TOTAL], [2, 1], [0, 0]), (TWO, [-2], [0])],
    "do not fit": [(TWO, [3], [0]), (TWO * 2, [2], [0]), ([TWO], [2], [0])],
    "reaches beyond": [([HALF], [2**31 - 1], [0]), *((TWO, [2], [n]) for n in (2**15, -(2**15) - 1, 2**31 - 1))],
    "outside 1": [([0, TOTAL], [2], [0]), ([-1, TOTAL + 1], [2], [0]), ([1, TOTAL - 1], [2], [0])],
    "sum": [
        ([MAX_FREQUENCY, TOTAL - MAX_FREQUENCY - 1], [2], [0]),
        ([MAX_FREQUENCY, TOTAL - MAX_FREQUENCY] * 2 + [1], [2, 3], [0, 0]),
        ([HALF, HALF + 5, HALF, HALF - 5], [2, 2], [0, 0]),
    ],
}


@pytest.mark.parametrize(("message", "arrays"), [(m, case) for m, cases in UNSOUND.items() for case in cases])
def test_unsound_tables_are_refused(message: str, arrays: tuple[list, list, list]) -> None:
    rejected(message, Tables, *map(np.array, arrays))
