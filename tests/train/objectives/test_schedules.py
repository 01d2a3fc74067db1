"""Test the schedules of the KL weight and the learning rate."""

import dataclasses
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config.presets import mnist_vae, photo
from train.config.vae import ELBOConfig, TrainConfig
from train.objectives.schedules import beta_at, learning_rate_at

WARMUPS = ("none", "linear", "cosine", "cyclical")


def elbo(warmup: str, *, beta: float = 2.0, steps: int = 10) -> ELBOConfig:
    base = photo().objective
    return dataclasses.replace(base, warmup=warmup, beta=beta, warmup_steps=steps)  # pyright: ignore[reportArgumentType]


def run(*, steps: int = 100, warmup: int = 10) -> TrainConfig:
    return dataclasses.replace(photo(), steps=steps, lr_warmup_steps=warmup, learning_rate=0.5)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_without_warmup_beta_is_constant(warmup: str) -> None:
    for config in (elbo(warmup, steps=0), elbo("none")):
        assert [beta_at(config, step) for step in (0, 1, 100)] == [2.0] * 3


@pytest.mark.parametrize("warmup", ["linear", "cosine"])
def test_beta_rises_once_from_zero_and_stays(warmup: str) -> None:
    betas = [beta_at(elbo(warmup), step) for step in range(30)]
    rise = {"linear": lambda s: 0.2 * s, "cosine": lambda s: 1.0 - math.cos(math.pi * s / 10)}[warmup]
    assert betas[:10] == pytest.approx([rise(step) for step in range(10)]) and betas[10:] == [2.0] * 20


@given(step=st.integers(0, 1000))
def test_cyclical_warmup_rises_over_the_first_half_of_each_cycle(step: int) -> None:
    """Fu et al. (2019), eq. 6 with R = 0.5."""
    phase = step % 10
    assert beta_at(elbo("cyclical"), step) == pytest.approx(2.0 * phase / 5 if phase < 5 else 2.0)


@given(
    step=st.integers(0, 10**4), warmup=st.sampled_from(WARMUPS), steps=st.integers(0, 500), beta=st.floats(0.0, 100.0)
)
def test_beta_never_leaves_its_range(step: int, warmup: str, steps: int, beta: float) -> None:
    assert 0.0 <= beta_at(elbo(warmup, beta=beta, steps=steps), step) <= beta


def test_the_learning_rate_warms_up_linearly_and_falls_by_half_a_cosine_to_zero() -> None:
    rates = [learning_rate_at(run(), step) for step in range(101)]
    assert rates[:11] == pytest.approx([0.05 * (i + 1) for i in range(10)] + [0.5])
    assert rates[55] == pytest.approx(0.25) and rates[100] == 0.0
    assert all(a > b for a, b in pairwise(rates[10:]))
    cosine = [0.25 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert [learning_rate_at(run(warmup=0), step) for step in range(100)] == pytest.approx(cosine)


@given(step=st.integers(0, 400), steps=st.integers(0, 300), warmup=st.integers(0, 400))
def test_the_learning_rate_is_defined_and_in_range_whatever_the_lengths(step: int, steps: int, warmup: int) -> None:
    assert 0.0 <= learning_rate_at(run(steps=steps, warmup=warmup), step) <= 0.5


def test_stages_are_those_of_burda_et_al() -> None:
    """Stage i has 10^(-i/7) of the rate for 3^i of 3280 passes."""
    config = dataclasses.replace(mnist_vae(), steps=3280 * 10, learning_rate=1e-3)
    rates = [learning_rate_at(config, step) for step in range(0, config.steps, 10)]
    expected = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert rates == pytest.approx(expected)
