"""Every distribution sums to one in integers, and every integer has a symbol."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.prior.tables import MIN_SYMBOL_BITS, TOTAL, Tables, join, normalize

MOST = TOTAL - 2**14
weights = st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=40).map(np.array)


def table(*counts: int, first: int = 0) -> Tables:
    return Tables(np.array(counts), np.array([len(counts)]), np.array([first]))


@given(weights)
def test_normalized_frequencies_sum_to_the_total_and_leave_every_symbol_some(w: np.ndarray) -> None:
    counts = normalize(w)
    assert counts.sum() == TOTAL and counts.min() >= 1 and counts.max() <= MOST
    Tables(counts, np.array([len(counts)]), np.array([0]))


@given(weights)
def test_normalized_frequencies_follow_their_weights(w: np.ndarray) -> None:
    counts, share = normalize(w), w / w.sum()
    order = np.argsort(-w, kind="stable")
    assert (np.diff(counts[order]) <= 0).all()
    if share.max() * TOTAL < MOST - len(w):  # else the cap moves some
        assert (counts[order[1:]] / TOTAL <= share[order[1:]] + 1 / TOTAL).all()
        assert np.abs(counts / TOTAL - share).max() <= (len(w) + 2) / TOTAL


@given(weights, st.floats(1e-3, 1e3))
def test_the_scale_of_weights_does_not_matter(w: np.ndarray, scale: float) -> None:
    scale = 2.0 ** round(math.log2(scale))  # exact
    np.testing.assert_array_equal(normalize(w), normalize(w * scale))


def test_the_cheapest_symbol_costs_least_bits() -> None:
    tables = table(*normalize(np.array([1.0, 1e-30])))
    assert tables.bits(np.zeros(1000, np.int64), np.zeros(1000, np.int64)) == pytest.approx(1000 * MIN_SYMBOL_BITS)
    assert 0.001 < MIN_SYMBOL_BITS < 0.0015


@given(st.lists(st.tuples(st.integers(-(2**15), 2**15 - 40), weights), min_size=1, max_size=5), st.data())
def test_symbols_and_values_are_inverse_but_for_escapes(
    parts: list[tuple[int, np.ndarray]], data: st.DataObject
) -> None:
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
    inside = (offsets >= 0) & (offsets < tables.sizes[chosen] - 1)
    np.testing.assert_array_equal(inside, ~escaped)
    counts = np.array([tables.frequencies(t)[s] for t, s in zip(chosen, symbols, strict=True)])
    bits = (24 - np.log2(counts)).sum() + 16 * escaped.sum()
    assert tables.bits(values, chosen) == pytest.approx(bits, abs=1e-6)


@pytest.mark.parametrize(
    ("counts", "sizes", "first", "message"),
    [
        ([TOTAL // 2] * 2, [], [], "need one size"),
        ([TOTAL // 2] * 2, [2], [0, 0], "one first value each"),
        ([TOTAL // 2] * 2, [[2]], [[0]], "need one size"),
        ([MOST, TOTAL - MOST, TOTAL], [2, 1], [0, 0], "2 or more"),
        ([TOTAL // 2] * 2, [-2], [0], "2 or more"),
        ([TOTAL // 2] * 2, [3], [0], "do not fit"),
        ([TOTAL // 2] * 4, [2], [0], "do not fit"),
        ([[TOTAL // 2] * 2], [2], [0], "do not fit"),
        ([TOTAL // 2], [2**31 - 1], [0], "reaches beyond"),
        ([TOTAL // 2] * 2, [2], [2**15], "reaches beyond"),
        ([TOTAL // 2] * 2, [2], [-(2**15) - 1], "reaches beyond"),
        ([TOTAL // 2] * 2, [2], [2**31 - 1], "reaches beyond"),
        ([0, TOTAL], [2], [0], "outside 1"),
        ([-1, TOTAL + 1], [2], [0], "outside 1"),
        ([1, TOTAL - 1], [2], [0], "outside 1"),
        ([MOST, TOTAL - MOST - 1], [2], [0], "sum"),
        ([MOST, TOTAL - MOST, MOST, TOTAL - MOST + 1], [2, 2], [0, 0], "sum"),
        ([TOTAL // 2, TOTAL // 2 + 5, TOTAL // 2, TOTAL // 2 - 5], [2, 2], [0, 0], "sum"),
    ],
)
def test_unsound_tables_are_refused(counts: list, sizes: list, first: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tables(np.array(counts), np.array(sizes), np.array(first))
