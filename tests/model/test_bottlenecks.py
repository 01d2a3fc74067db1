"""Bottlenecks: the shapes of their posteriors, the one clamp of log-variances, and float32 under autocast."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.model import config as configs
from latent_codec.model.bottlenecks import BOTTLENECKS, DiagonalGaussianBottleneck, IdentityBottleneck
from tests.support.networks import CLAMP, seeded
from tests.support.operators import Operators

IMPORTED = configs.DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0)
FSQ = configs.FiniteScalarConfig(levels=(3, 2, 5, 2, 4))
EVERY_KIND = [CLAMP, configs.IdentityConfig(), configs.VectorQuantizerConfig(codes=7), FSQ]

autocast_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
every_kind = pytest.mark.parametrize("config", EVERY_KIND, ids=lambda config: config.kind)
gaussians = pytest.mark.parametrize("config", [CLAMP, IMPORTED], ids=["trained here", "imported"])


def make(config: configs.BottleneckConfig, z: int = 5) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        bottleneck = BOTTLENECKS[config.kind](config, z)
    assert isinstance(bottleneck, torch.nn.Module)
    return bottleneck


def test_every_registered_bottleneck_is_tested_here() -> None:
    assert {config.kind for config in EVERY_KIND} == set(BOTTLENECKS)


@every_kind
def test_its_features_become_z_channels(config: configs.BottleneckConfig) -> None:
    z, bottleneck = 5, make(config)
    posterior = bottleneck(torch.randn(2, bottleneck.features, 3, 4, generator=seeded(0)))
    assert posterior.mode().shape == posterior.mean.shape == (2, z, 3, 4)
    assert posterior.sample(torch.zeros(2, z, 3, 4)).shape == (2, z, 3, 4)
    assert posterior.kl().shape == (2,) and (posterior.kl() >= 0).all()
    torch.testing.assert_close(posterior.kl(), posterior.kl_map().flatten(1).sum(1))


@every_kind
def test_no_constant_is_copied_to_the_device_in_a_step(config: configs.BottleneckConfig) -> None:
    bottleneck = make(config)
    features = torch.randn(2, bottleneck.features, 3, 4)
    with Operators() as seen:
        bottleneck(features)
    assert seen.names and "lift_fresh" not in seen.names  # which is `torch.tensor` of numbers


@every_kind
@autocast_types
def test_autocast_changes_nothing(config: configs.BottleneckConfig, dtype: torch.dtype) -> None:
    bottleneck = make(config)
    features = torch.randn(2, bottleneck.features, 6, 5, generator=seeded(2))
    plain = bottleneck(features)
    with torch.autocast("cpu", dtype=dtype):
        cast = bottleneck(features)
        assert torch.equal(cast.kl(), plain.kl()) and torch.equal(cast.sample(seeded(3)), plain.sample(seeded(3)))
    assert torch.equal(cast.coded, plain.coded) and cast.mode().dtype == torch.float32


@autocast_types
@gaussians
def test_autocast_keeps_extremes_finite_in_float32(dtype: torch.dtype, config: configs.DiagonalGaussianConfig) -> None:
    extremes = torch.tensor([-1e4, 0.0, 1e4])
    features = torch.stack(torch.meshgrid(extremes, extremes, indexing="ij"))[None]  # means, log-variances
    features = features.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        posterior = DiagonalGaussianBottleneck(config, 1)(features)
        z, kl = posterior.sample(seeded(0)), posterior.kl()
        (kl.sum() + z.sum()).backward()
    for tensor in (posterior.mean, posterior.logvar, posterior.std, posterior.mode(), z, kl, posterior.kl_map()):
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
    assert features.grad is not None and features.grad.isfinite().all()


@autocast_types
def test_under_autocast_kl_does_not_overflow_or_lose_digits_on_a_large_latent(dtype: torch.dtype) -> None:
    features = (3 * torch.randn((1, 32, 128, 128), generator=seeded(0))).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        kl = DiagonalGaussianBottleneck(CLAMP, 4)(features).kl()
    mean, logvar = features.double().chunk(2, dim=1)
    logvar = logvar.clamp(-16, 11)
    expected = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum()  # Kingma & Welling (2014), appendix B
    assert expected.item() > 10 * torch.finfo(torch.float16).max
    torch.testing.assert_close(kl[0].double(), expected, rtol=1e-5, atol=0)


@gaussians
def test_the_clamp_is_hard_and_of_the_log_variance_alone(config: configs.DiagonalGaussianConfig) -> None:
    low, high = config.logvar_min, config.logvar_max
    raw = torch.tensor([low - 100, low - 1e-3, low + 1e-3, 0.0, high - 1e-3, high + 1e-3, high + 100])
    features = torch.cat([1e6 * raw, raw]).reshape(1, 14, 1, 1).requires_grad_()
    posterior = DiagonalGaussianBottleneck(config, 7)(features)
    expected = torch.tensor([low, low, raw[2].item(), 0.0, raw[4].item(), high, high])
    assert torch.equal(posterior.mean.flatten(), 1e6 * raw)
    assert torch.equal(posterior.logvar.detach().flatten(), expected)
    posterior.logvar.sum().backward()
    assert features.grad is not None and features.grad[0, 7:].flatten().tolist() == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.slow
@given(st.lists(st.floats(-40, 30, width=32), min_size=1, max_size=12))
def test_clamped_is_the_share_of_changed_log_variances(raw: list[float]) -> None:
    logvar = torch.tensor(raw).reshape(1, -1, 1, 1)
    posterior = DiagonalGaussianBottleneck(CLAMP, 4)(torch.cat([torch.full_like(logvar, 1e3), logvar], 1))
    assert posterior.clamped.shape == ()
    assert posterior.clamped.item() == pytest.approx(sum(not -16 <= v <= 11 for v in raw) / len(raw), abs=1e-6)


def test_channels_beyond_those_predicted_have_a_trained_log_variance_each() -> None:
    """It is clamped as the others are, and the encoder has no features for it."""
    few = DiagonalGaussianBottleneck(dataclasses.replace(CLAMP, logvar_channels=2), 5)
    assert few.features == 7 and few.logvar is not None
    few.logvar.data = torch.tensor([-1.0, 50.0, 0.5])
    features = torch.randn(2, 7, 3, 4, generator=seeded(0))
    posterior = few(features)
    rest = torch.tensor([-1.0, 11.0, 0.5])[:, None, None].expand(2, -1, 3, 4)
    whole = DiagonalGaussianBottleneck(CLAMP, 5)(torch.cat([features, rest], 1))
    assert torch.equal(posterior.mean, whole.mean) and torch.equal(posterior.logvar, whole.logvar)
    posterior.kl().sum().backward()
    assert few.logvar.grad is not None and few.logvar.grad.ne(0).tolist() == [True, False, True]


def test_an_identity_gives_the_features_and_charges_nothing() -> None:
    features = torch.randn(2, 3, 4, 5, generator=seeded(0)).half()
    posterior = IdentityBottleneck(configs.IdentityConfig(), 3)(features)
    for latents in (posterior.mean, posterior.mode(), posterior.sample(torch.ones(2, 3, 4, 5)), posterior.coded):
        assert torch.equal(latents, features.float())
    assert torch.equal(posterior.kl(), torch.zeros(2))
