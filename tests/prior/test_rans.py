"""The entropy coder is lossless, close to the ideal code length, and to the bit what docs/bitstream.md says."""

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.prior.rans import Coder, Decoder, PassSymbols
from latent_codec.prior.tables import MIN_SYMBOL_BITS, Tables, join, normalize
from tests.support import reference_decoder
from tests.support.errors import refused


@functools.cache
def coder() -> Coder:
    """Return a coder with tables of 2 to 1000 symbols, flat and steep, with the cheapest symbol there can be."""
    rng = np.random.default_rng(0)
    parts = [(0, normalize(np.array([1.0, 1e-30]))), (5, normalize(np.array([1e-30, 1.0])))]
    parts += [(-(n // 2), normalize(rng.gamma(shape, size=n))) for n in (2, 3, 17, 1000) for shape in (0.02, 1, 50)]
    return Coder(join(parts))


def draw_passes(seed: int, lengths: list[int], far: float) -> list[PassSymbols]:
    """Draw values from the tables' own distributions, a share `far` of them from all of 16 bits."""
    rng, tables, passes = np.random.default_rng(seed), coder().tables, []
    for n in lengths:
        chosen = rng.integers(0, len(tables), n)
        values = [tables.first[t] + rng.choice(tables.sizes[t], p=tables.frequencies(t) / 2**24) for t in chosen]
        anywhere = rng.integers(-(2**15), 2**15, n)
        passes.append((np.where(rng.random(n) < far, anywhere, np.array(values, np.int64)).astype(np.int64), chosen))
    return passes


def decode(payload: bytes, tables: list[np.ndarray]) -> list[list[int]]:
    decoder = Decoder(coder(), payload)
    found = [decoder.read(chosen).tolist() for chosen in tables]
    decoder.finish()
    return found


def independent(tables: Tables) -> reference_decoder.Tables:
    return reference_decoder.Tables(tables.counts, tables.sizes, tables.first)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 50), min_size=1, max_size=5), st.sampled_from([0, 0.01, 0.5, 1]))
def test_payloads_are_lossless_near_the_ideal_length_and_to_the_bit(seed: int, lengths: list[int], far: float) -> None:
    passes, tables, writer = draw_passes(seed, lengths, far), independent(coder().tables), reference_decoder.Writer()
    for values, chosen in reversed(passes):
        tables.write(writer, values.tolist(), chosen.tolist())
    payload = coder().encode(passes)
    assert writer.payload() == payload
    ans, expected = reference_decoder.Ans(payload), [values.tolist() for values, _ in passes]
    assert [tables.read(ans, chosen.tolist()) for _, chosen in passes] == expected
    ans.finish()
    assert decode(payload, [chosen for _, chosen in passes]) == expected
    bits = sum(coder().tables.bits(values, chosen).sum() for values, chosen in passes)
    assert bits <= 8 * len(payload) <= 1.001 * bits + 65 and sum(lengths) * MIN_SYMBOL_BITS <= 8 * len(payload)


def test_a_long_run_of_the_cheapest_symbol_costs_the_least_bits() -> None:
    n = 200_000
    payload = coder().encode([(np.zeros(n, np.int64), np.zeros(n, np.int64))])
    assert 0.001 < MIN_SYMBOL_BITS < 0.0015
    assert n * MIN_SYMBOL_BITS <= 8 * len(payload) <= 1.001 * n * MIN_SYMBOL_BITS + 65
    assert decode(payload, [np.zeros(n, np.int64)]) == [[0] * n]


@given(st.binary(max_size=60), st.lists(st.integers(0, 200), max_size=3), st.integers(0, 2**32))
def test_any_bytes_decode_or_are_refused_and_both_decoders_agree(data: bytes, lengths: list[int], seed: int) -> None:
    chosen = [np.random.default_rng(seed).integers(0, len(coder().tables), n) for n in lengths]
    tables = independent(coder().tables)

    try:
        ans = reference_decoder.Ans(data)
        expected = [tables.read(ans, c.tolist()) for c in chosen]
        ans.finish()
    except reference_decoder.RefusalError:
        refused("damaged", decode, data, chosen)
    else:
        assert decode(data, chosen) == expected


def test_a_payload_that_is_cut_or_has_more_before_it_is_refused() -> None:
    passes = draw_passes(3, [30, 0, 50], 0.1)
    payload, tables = coder().encode(passes), [chosen for _, chosen in passes]
    for length in range(len(payload)):
        for part in (payload[:length], payload[len(payload) - length :]):
            refused("damaged", decode, part, tables)
    refused("do not begin", decode, bytes(4) + payload, tables)


def test_an_escape_for_a_value_with_a_symbol_is_refused() -> None:
    """So latents have one payload only."""
    tables = independent(coder().tables)
    cumulative, first = tables.cumulative[9], tables.first[9]
    for value, needed in ((first - 1, True), (first, False), (first + len(cumulative) - 2, True)):
        writer = reference_decoder.Writer()
        writer.symbol(reference_decoder.UNIFORM, value + 2**15)
        writer.symbol(cumulative, len(cumulative) - 2)
        decoder = Decoder(coder(), writer.payload())
        if needed:
            assert decoder.read(np.array([9])).tolist() == [value]
            continue
        refused("non-canonical escape code", decoder.read, np.array([9]))
