"""The Gaussian posterior: its KL, its clamp, its samples, and float32 whatever autocast does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from latent_codec.model.bottlenecks import BOTTLENECKS, DiagonalGaussian, DiagonalGaussianBottleneck, IdentityBottleneck
from latent_codec.model.config import (
    BottleneckConfig,
    DiagonalGaussianConfig,
    FiniteScalarConfig,
    IdentityConfig,
    VectorQuantizerConfig,
)

TRAINED_HERE = DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0)
IMPORTED = DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0)

autocast_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
configs = pytest.mark.parametrize("config", [TRAINED_HERE, IMPORTED])


def features_of(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    return torch.cat([mean, logvar], dim=1)


def random_posterior(*shape: int, seed: int = 0) -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn((2, *shape), generator=generator).unbind(0)
    return DiagonalGaussian(3 * mean, 2 * logvar)


def reference_kl(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Per image in float64, written out as in Kingma & Welling (2014), appendix B."""
    mean, logvar = mean.double(), logvar.double()
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).flatten(1).sum(1)


def test_kl_equals_that_of_torch_distributions() -> None:
    posterior = random_posterior(3, 4, 5, 6)
    q = Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp())
    expected = kl_divergence(q, Normal(torch.zeros(()).double(), torch.ones(()).double()))
    torch.testing.assert_close(posterior.kl_map().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(posterior.kl().double(), expected.flatten(1).sum(1), rtol=1e-5, atol=1e-6)


def test_kl_is_the_expected_log_ratio_of_its_own_samples() -> None:
    posterior = DiagonalGaussian(
        torch.tensor([0.0, 2.0, -1.0, 0.3]).reshape(1, 4, 1, 1), torch.tensor([0.0, -3.0, 1.5, 0.1]).reshape(1, 4, 1, 1)
    )
    n = 200_000
    many = DiagonalGaussian(posterior.mean.expand(n, 4, 1, 1), posterior.logvar.expand(n, 4, 1, 1))
    z = many.sample(torch.Generator().manual_seed(1))
    ratio = (Normal(many.mean, many.std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).double().flatten(1)  # (n, 4)
    error = (ratio.mean(0) - posterior.kl_map().flatten().double()).abs()
    assert (error <= 4 * ratio.std(0) / math.sqrt(n) + 1e-6).all()


def test_kl_is_per_image() -> None:
    posterior = random_posterior(4, 3, 2, 5)
    alone = [DiagonalGaussian(posterior.mean[i : i + 1], posterior.logvar[i : i + 1]).kl() for i in range(4)]
    torch.testing.assert_close(posterior.kl(), torch.cat(alone))
    assert posterior.kl().shape == (4,)


@given(st.floats(-0.5, 0.5, width=32), st.floats(-0.5, 0.5, width=32))
def test_kl_is_not_negative_and_keeps_its_digits_near_the_prior(mean: float, logvar: float) -> None:
    m, v = torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), logvar)
    found = DiagonalGaussian(m, v).kl().double()
    expected = 0.5 * (mean**2 + math.expm1(logvar) - logvar)
    assert abs(found.item() - expected) <= 1e-6 * expected + 1e-7 * abs(logvar) + 1e-37  # float32 ends there
    assert found.item() >= -1e-7 * abs(logvar)


def test_kl_vanishes_at_the_prior() -> None:
    zero = torch.zeros(2, 3, 4, 4)
    assert torch.equal(DiagonalGaussian(zero, zero).kl(), torch.zeros(2))


@autocast_types
@configs
@pytest.mark.parametrize("mean", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("logvar", [-1e4, 0.0, 1e4])
def test_under_autocast_kl_sample_and_gradients_are_finite_float32(
    dtype: torch.dtype, config: DiagonalGaussianConfig, mean: float, logvar: float
) -> None:
    shape = (1, 4, 8, 8)
    features = features_of(torch.full(shape, mean), torch.full(shape, logvar)).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        posterior = DiagonalGaussianBottleneck(config, 4)(features)
        z = posterior.sample(torch.Generator().manual_seed(0))
        kl = posterior.kl()
        (kl.sum() + z.sum()).backward()
    for tensor in (posterior.mean, posterior.logvar, posterior.std, posterior.mode(), z, kl, posterior.kl_map()):
        assert tensor.dtype == torch.float32
        assert tensor.isfinite().all()
    assert features.grad is not None and features.grad.isfinite().all()


@autocast_types
def test_under_autocast_kl_does_not_overflow_or_lose_digits_on_a_large_latent(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    features = (3 * torch.randn((1, 32, 128, 128), generator=generator)).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        posterior = DiagonalGaussianBottleneck(TRAINED_HERE, 4)(features)
        kl = posterior.kl()
    mean, logvar = features.chunk(2, dim=1)
    expected = reference_kl(mean, logvar.double().clamp(-16, 11))
    assert expected.item() > 10 * torch.finfo(torch.float16).max
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=0)


@autocast_types
def test_autocast_changes_nothing_about_a_posterior(dtype: torch.dtype) -> None:
    features = torch.randn((2, 8, 5, 5), generator=torch.Generator().manual_seed(2))
    bottleneck = DiagonalGaussianBottleneck(TRAINED_HERE, 4)
    plain = bottleneck(features)
    with torch.autocast("cpu", dtype=dtype):
        cast = bottleneck(features)
        assert torch.equal(cast.kl(), plain.kl())
        assert torch.equal(
            cast.sample(torch.Generator().manual_seed(3)), plain.sample(torch.Generator().manual_seed(3))
        )


def test_the_range_trained_here_has_finite_non_zero_variance_in_float16() -> None:
    for logvar in (TRAINED_HERE.logvar_min, TRAINED_HERE.logvar_max):
        variance = torch.tensor(logvar, dtype=torch.float16).exp()
        assert variance.isfinite() and variance > 0


@configs
def test_the_clamp_is_hard(config: DiagonalGaussianConfig) -> None:
    low, high = config.logvar_min, config.logvar_max
    raw = torch.tensor([low - 100, low - 1e-3, low + 1e-3, 0.0, high - 1e-3, high + 1e-3, high + 100])
    features = features_of(torch.zeros(1, 7, 1, 1), raw.reshape(1, 7, 1, 1)).requires_grad_()
    posterior = DiagonalGaussianBottleneck(config, 4)(features)
    expected = torch.tensor([low, low, raw[2].item(), 0.0, raw[4].item(), high, high])
    assert torch.equal(posterior.logvar.detach().flatten(), expected)
    posterior.logvar.sum().backward()
    assert features.grad is not None
    assert features.grad[0, 7:].flatten().tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_the_mean_is_not_clamped() -> None:
    mean = torch.tensor([-1e6, 1e6]).reshape(1, 2, 1, 1)
    assert torch.equal(DiagonalGaussianBottleneck(TRAINED_HERE, 4)(features_of(mean, mean)).mean, mean)


@pytest.mark.parametrize("logvar", [-60.0, -20.0, 15.0, 40.0])
def test_the_posterior_itself_clamps_nothing(logvar: float) -> None:
    v = torch.full((1, 1, 1, 1), logvar)
    posterior = DiagonalGaussian(torch.zeros_like(v), v)
    assert posterior.std.item() == pytest.approx(math.exp(logvar / 2), rel=1e-5)
    assert posterior.kl().item() == pytest.approx(0.5 * (math.expm1(logvar) - logvar), rel=1e-5)
    assert posterior.sample(torch.ones_like(v)).item() == pytest.approx(math.exp(logvar / 2), rel=1e-5)


@given(st.lists(st.floats(-40, 30, width=32), min_size=1, max_size=12))
def test_clamped_is_the_share_of_changed_logvars(raw: list[float]) -> None:
    logvar = torch.tensor(raw).reshape(1, -1, 1, 1)
    posterior = DiagonalGaussianBottleneck(TRAINED_HERE, 4)(features_of(torch.full_like(logvar, 1e3), logvar))
    expected = sum(not -16 <= v <= 11 for v in raw) / len(raw)
    assert posterior.clamped.shape == ()
    assert posterior.clamped.item() == pytest.approx(expected, abs=1e-6)


def test_features_are_means_first() -> None:
    features = torch.randn((2, 6, 3, 4), generator=torch.Generator().manual_seed(0))
    posterior = DiagonalGaussianBottleneck(TRAINED_HERE, 4)(features)
    assert torch.equal(posterior.mean, features[:, :3])
    assert torch.equal(posterior.logvar, features[:, 3:])
    assert torch.equal(posterior.mode(), features[:, :3])


def test_a_sample_is_the_mean_plus_std_times_the_given_noise() -> None:
    posterior = random_posterior(2, 3, 4, 5)
    noise = torch.randn((2, 3, 4, 5), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(posterior.sample(noise), posterior.mean + (0.5 * posterior.logvar).exp() * noise)
    assert torch.equal(posterior.sample(torch.zeros_like(noise)), posterior.mode())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_sample_is_float32_whatever_the_noise_is(dtype: torch.dtype) -> None:
    posterior = random_posterior(1, 2, 3, 4)
    assert posterior.sample(torch.ones(1, 2, 3, 4, dtype=dtype)).dtype == torch.float32


def test_a_sample_depends_on_the_generator_alone() -> None:
    posterior = random_posterior(2, 3, 4, 5)
    first = posterior.sample(torch.Generator().manual_seed(7))
    state = torch.get_rng_state()
    torch.rand(3)
    again = posterior.sample(torch.Generator().manual_seed(7))
    assert torch.equal(first, again)
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(8)))
    torch.set_rng_state(state)
    posterior.sample(torch.Generator().manual_seed(7))
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_have_the_posterior_moments() -> None:
    n = 100_000
    mean, logvar = torch.tensor([1.5, -2.0]).reshape(1, 2, 1, 1), torch.tensor([-2.0, 1.0]).reshape(1, 2, 1, 1)
    posterior = DiagonalGaussian(mean.expand(n, 2, 1, 1), logvar.expand(n, 2, 1, 1))
    z = posterior.sample(torch.Generator().manual_seed(0)).double().flatten(1)  # (n, 2)
    std = (0.5 * logvar.double()).exp().flatten()
    assert ((z.mean(0) - mean.flatten()).abs() < 4 * std / math.sqrt(n)).all()
    assert ((z.std(0) / std - 1).abs() < 4 / math.sqrt(2 * n)).all()


@pytest.mark.parametrize("shape", [(1, 3, 4, 5), (2, 3, 1, 1), (2, 3, 5, 4), (3, 4, 5), ()])
def test_noise_of_another_shape_is_an_error_even_if_it_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        random_posterior(2, 3, 4, 5).sample(torch.zeros(shape))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, -2.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_empty_logvar_range_is_an_error_that_names_both_limits(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"logvar_min.*logvar_max"):
        DiagonalGaussianBottleneck(DiagonalGaussianConfig(logvar_min=low, logvar_max=high), 4)


@pytest.mark.parametrize(
    "config",
    [
        TRAINED_HERE,
        IdentityConfig(),
        VectorQuantizerConfig(codes=7),
        FiniteScalarConfig(levels=(3, 2, 5, 2, 4)),
    ],
    ids=lambda config: config.kind,
)
def test_a_bottleneck_turns_features_per_latent_times_z_channels_into_z(config: BottleneckConfig) -> None:
    z = 5
    bottleneck = BOTTLENECKS[config.kind](config, z)
    features = torch.randn(2, bottleneck.features_per_latent * z, 3, 4, generator=torch.Generator().manual_seed(0))
    posterior = bottleneck(features)
    assert posterior.mode().shape == posterior.mean.shape == (2, z, 3, 4)
    assert posterior.sample(torch.zeros(2, z, 3, 4)).shape == (2, z, 3, 4)
    assert posterior.kl().shape == (2,) and (posterior.kl() >= 0).all()
    torch.testing.assert_close(posterior.kl(), posterior.kl_map().flatten(1).sum(1))


def test_an_identity_gives_what_the_encoder_says_and_charges_nothing() -> None:
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).half()
    posterior = IdentityBottleneck(IdentityConfig(), 3)(features)
    noise = torch.ones(2, 3, 4, 5)
    assert torch.equal(posterior.mean, features.float())
    assert torch.equal(posterior.sample(noise), posterior.mode())
    assert torch.equal(posterior.coded, posterior.mean)
    assert torch.equal(posterior.kl(), torch.zeros(2))
