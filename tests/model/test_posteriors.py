"""The Gaussian posterior: its KL, its samples, and float32 under autocast."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from latent_codec.model.posteriors import DiagonalGaussian
from tests.support.errors import rejected
from tests.support.networks import seeded


def random_posterior(*shape: int) -> DiagonalGaussian:
    """Return a posterior of means and log-variances of any size: it clamps nothing."""
    mean, logvar = torch.randn((2, *shape), generator=seeded(0)).unbind(0)
    logvar[..., 0], logvar[..., 1] = -30, 20
    return DiagonalGaussian(3 * mean, 2 * logvar)


def test_kl_equals_that_of_torch_distributions_for_each_image() -> None:
    posterior = random_posterior(3, 4, 5, 6)
    q = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    expected = kl_divergence(q, Normal(torch.zeros(()).double(), torch.ones(()).double()))
    torch.testing.assert_close(posterior.kl_map().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.kl().double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-6)


def test_samples_have_the_posterior_moments_and_the_kl_is_their_expected_log_ratio() -> None:
    n = 200_000
    mean = torch.tensor([0.0, 2.0, -1.0, 0.3]).reshape(1, 4, 1, 1)
    logvar = torch.tensor([0.0, -3.0, 1.5, 0.1]).reshape(1, 4, 1, 1)
    many = DiagonalGaussian(mean.expand(n, 4, 1, 1), logvar.expand(n, 4, 1, 1))
    z = many.sample(seeded(1))
    std = (0.5 * logvar.double()).exp().flatten()
    drawn = z.double().flatten(1)
    assert ((drawn.mean(0) - mean.flatten()).abs() < 4 * std / math.sqrt(n)).all()
    assert ((drawn.std(0) / std - 1).abs() < 4 / math.sqrt(2 * n)).all()
    ratio = (Normal(many.mean, many.std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).double().flatten(1)  # (n, 4)
    error = (ratio.mean(0) - many.kl_map()[0].flatten().double()).abs()
    assert (error <= 4 * ratio.std(0) / math.sqrt(n) + 1e-6).all()
    torch.testing.assert_close(many.log_ratio(z).double(), -ratio.sum(1), rtol=1e-4, atol=1e-5)


@given(st.floats(-0.5, 0.5, width=32), st.floats(-0.5, 0.5, width=32))
@example(0.0, 0.0)
def test_kl_is_not_negative_and_keeps_its_digits_near_the_prior(mean: float, logvar: float) -> None:
    m, v = torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), logvar)
    found = DiagonalGaussian(m, v).kl().double()
    expected = 0.5 * (mean**2 + math.expm1(logvar) - logvar)
    assert abs(found.item() - expected) <= 1e-6 * expected + 1e-7 * abs(logvar) + 1e-37  # float32 ends there
    assert found.item() >= -1e-7 * abs(logvar)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_sample_is_the_mean_plus_std_times_the_given_noise_in_float32(dtype: torch.dtype) -> None:
    posterior = random_posterior(2, 3, 4, 5)
    noise = torch.randn((2, 3, 4, 5), generator=seeded(5)).to(dtype)
    sample = posterior.sample(noise)
    assert sample.dtype == torch.float32
    torch.testing.assert_close(sample, posterior.mean + (0.5 * posterior.logvar).exp() * noise.float())
    assert torch.equal(posterior.sample(torch.zeros_like(noise)), posterior.mode())


def test_a_sample_depends_on_the_generator_alone() -> None:
    posterior = random_posterior(2, 3, 4, 5)
    state = torch.get_rng_state()
    first = posterior.sample(seeded(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first, posterior.sample(seeded(7))) and not torch.equal(first, posterior.sample(seeded(8)))


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 1, 1), (3, 4, 5), ()])
def test_noise_of_another_shape_is_an_error_even_if_it_would_broadcast(shape: tuple[int, ...]) -> None:
    rejected("shape", random_posterior(2, 3, 4, 5).sample, torch.zeros(shape))
