"""Quantised latents come back within their step, and dither makes what comes back a draw around the mean."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.prior import quantizer
from latent_codec.prior.quantizer import DEAD_ZONE, LIMIT, STEP_ONE, Quantized, dequantize, dither, step_code
from tests.support import reference_decoder
from tests.support.errors import refused
from tests.support.prior import quantize_plainly

N = 100_000
codes = st.integers(16, 65535)
seeds = st.integers(0, 2**64 - 1)
STEPS = np.array([0.37, 1.9, 1e-3], np.float32)
ONE = np.ones(1, np.float32)


def latents(seed: int, *shape: int) -> torch.Tensor:
    """Return normal latents that are a few of `STEPS` large."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 3 * noise * torch.from_numpy(STEPS)[:, None, None]


@given(codes, st.none() | seeds, st.integers(0, 99))
def test_errors_are_at_most_half_a_step_and_the_dead_zone_and_made_once(code: int, seed: int | None, data: int) -> None:
    mean = latents(data, 3, 4, 5)
    quantized = quantize_plainly(mean, STEPS, code, seed)
    found = dequantize(quantized, STEPS)
    error = (found.double() - mean.double()).numpy() / (STEPS.astype(np.float64) * code / STEP_ONE)[:, None, None]
    assert np.abs(error).max() <= 0.5 + DEAD_ZONE * (seed is None) + 1e-4
    np.testing.assert_array_equal(quantize_plainly(found, STEPS, code, seed).values, quantized.values)


def test_magnitudes_below_the_dead_zone_are_rounded_down() -> None:
    x = torch.tensor([0.0, 0.5, 0.57, 0.59, 1.57, 1.59, 7.5])
    values = quantize_plainly(torch.cat([x, -x])[None, None], ONE, STEP_ONE, None).values
    assert values.reshape(2, -1).tolist() == [[0, 0, 0, 1, 1, 2, 7], [0, 0, 0, -1, -1, -2, -7]]


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 40.0])
def test_the_error_under_dither_is_uniform_whatever_the_signal(scale: float) -> None:
    mean = scale * torch.randn((1, 1, N), generator=torch.Generator().manual_seed(1))
    found = dequantize(quantize_plainly(mean, ONE, STEP_ONE, 5), ONE)
    e = (found.double() - mean.double()).flatten()
    for power, moment in ((1, 0.0), (2, 1 / 12), (3, 0.0), (4, 1 / 80)):
        deviation = math.sqrt((1 / (2 * power + 1)) / 4**power / N)  # at most, of the mean of e^power
        assert abs(e.pow(power).mean().item() - moment) < 4 * deviation
    ordered = (e.sort().values + 0.5).numpy()
    assert np.abs(ordered - np.arange(N) / N).max() < 1.95 / math.sqrt(N)  # Kolmogorov & Smirnov
    if scale:
        for other in (mean.flatten().double(), mean.flatten().abs().double()):
            for own in (e, e.square()):
                assert abs(torch.corrcoef(torch.stack([own, other]))[0, 1].item()) < 4 / math.sqrt(N)


@given(seeds, st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)))
def test_dither_is_what_the_format_says(seed: int, shape: tuple[int, int, int]) -> None:
    found = dither(seed, shape)
    np.testing.assert_array_equal(found, reference_decoder.dither(seed, shape))
    assert (found % 2 == 1).all() and np.abs(found).max() < 2**16


def test_dither_of_neighbouring_seeds_and_positions_is_uncorrelated() -> None:
    rows = np.stack([dither(seed, (N // 50,)) for seed in range(50)]).astype(np.float64)
    for a, b in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1]), (rows[:, 64:], rows[:, :-64])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_octave_eighths_is_the_rounded_logarithm_and_never_falls() -> None:
    found = [quantizer.octave_eighths(code) for code in range(16, 65536)]
    exact = 8 * np.log2(np.arange(16, 65536) / STEP_ONE)
    assert np.abs(found - exact).max() <= 0.5 + 1e-9
    assert found == sorted(found) and found[0] == -48 and found[-1] == 48
    assert found[::97] == [reference_decoder.octave(code) for code in range(16, 65536, 97)]


@given(codes)
def test_a_stored_step_keeps_its_number(code: int) -> None:
    assert step_code(code / STEP_ONE) == code


def test_a_step_beyond_the_formats_is_refused() -> None:
    for step in (0.0, -1.0, quantizer.MIN_STEP * 0.99, quantizer.MAX_STEP * 1.0001, math.inf, math.nan):
        refused("step", step_code, step)


@pytest.mark.parametrize("value", [LIMIT + 1, -LIMIT - 1, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("seed", [None, 1])
def test_a_latent_beyond_the_limit_is_refused(value: float, seed: int | None) -> None:
    mean = torch.zeros(1, 2, 2)
    mean[0, 1, 1] = value + math.copysign(1, value)  # dither may take off half a step
    refused("give a larger --step", quantize_plainly, mean, ONE, STEP_ONE, seed)


@given(st.integers(-(2**31), 2**31), codes, st.floats(2**-20, 2**20, width=32))
def test_dequantising_is_one_product_in_float64(fine: int, code: int, channel_step: float) -> None:
    quantized = Quantized(np.full((1, 1, 1), fine), code, None)
    expected = np.float32(float(fine) * (float(np.float32(channel_step)) * code) / 2**27)
    assert dequantize(quantized, np.array([channel_step], np.float32)).item() == expected
