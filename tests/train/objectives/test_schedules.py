"""Schedules: pure functions of the step."""

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


@given(step=st.integers(0, 10**6), warmup=st.integers(1, 1000))
def test_without_warmup_beta_is_constant(step: int, warmup: int) -> None:
    assert beta_at(elbo("none", steps=warmup), step) == 2.0


@pytest.mark.parametrize("warmup", WARMUPS)
def test_zero_warmup_steps_are_no_warmup(warmup: str) -> None:
    assert [beta_at(elbo(warmup, steps=0), step) for step in (0, 1, 100)] == [2.0] * 3


@pytest.mark.parametrize("warmup", ["linear", "cosine"])
def test_beta_rises_once_from_zero_and_stays(warmup: str) -> None:
    betas = [beta_at(elbo(warmup), step) for step in range(30)]
    assert betas[0] == 0.0 and betas[5] == pytest.approx(1.0) and betas[10:] == [2.0] * 20
    assert all(a < b for a, b in pairwise(betas[:11]))


def test_linear_warmup_rises_by_equal_parts() -> None:
    assert [beta_at(elbo("linear"), step) for step in range(10)] == pytest.approx([0.2 * i for i in range(10)])


@given(step=st.integers(0, 10))
def test_cosine_warmup_is_half_a_cosine(step: int) -> None:
    assert beta_at(elbo("cosine"), step) == pytest.approx(1.0 - math.cos(math.pi * step / 10))


@given(step=st.integers(0, 1000))
def test_cyclical_warmup_rises_over_the_first_half_of_each_cycle(step: int) -> None:
    """Fu et al. (2019), eq. 6 with R = 0.5."""
    phase = step % 10
    assert beta_at(elbo("cyclical"), step) == pytest.approx(2.0 * phase / 5 if phase < 5 else 2.0)


@given(
    step=st.integers(0, 10**4), warmup=st.sampled_from(WARMUPS), steps=st.integers(0, 500), beta=st.floats(0.0, 100.0)
)
def test_beta_never_leaves_its_range_and_is_pure(step: int, warmup: str, steps: int, beta: float) -> None:
    config = elbo(warmup, beta=beta, steps=steps)
    assert 0.0 <= beta_at(config, step) <= beta
    assert beta_at(config, step) == beta_at(config, step)


def test_the_learning_rate_warms_up_by_equal_parts_to_its_full_value() -> None:
    rates = [learning_rate_at(run(), step) for step in range(11)]
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(0.5)


def test_the_learning_rate_falls_by_half_a_cosine_to_zero_at_the_end() -> None:
    assert learning_rate_at(run(), 55) == pytest.approx(0.25)
    assert learning_rate_at(run(), 100) == 0.0
    rates = [learning_rate_at(run(), step) for step in range(10, 100)]
    assert all(a > b > 0 for a, b in pairwise(rates))


@given(step=st.integers(0, 400), steps=st.integers(0, 300), warmup=st.integers(0, 400))
def test_the_learning_rate_is_defined_and_in_range_whatever_the_lengths(step: int, steps: int, warmup: int) -> None:
    assert 0.0 <= learning_rate_at(run(steps=steps, warmup=warmup), step) <= 0.5


@given(step=st.integers(0, 99))
def test_without_warmup_the_first_step_has_the_full_rate(step: int) -> None:
    config = run(warmup=0)
    assert learning_rate_at(config, step) == pytest.approx(0.25 * (1 + math.cos(math.pi * step / 100)))


def test_stages_are_those_of_burda_et_al() -> None:
    """Stage i has 10^(-i/7) of the rate for 3^i of 3280 passes."""
    config = dataclasses.replace(mnist_vae(), steps=3280 * 10, learning_rate=1e-3)
    rates = [learning_rate_at(config, step) for step in range(0, config.steps, 10)]
    expected = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert rates == pytest.approx(expected)
