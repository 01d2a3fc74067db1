"""Test that bounds of log p(x) are exact with the true posterior, ordered otherwise, and independent of batching."""

import math

import pytest
import torch

from latent_codec.evaluation.bounds import bounds
from latent_codec.model.codec import Codec
from latent_codec.model.config import BernoulliConfig, GaussianConfig, LinearConfig
from latent_codec.model.networks.linear import PatchMoments
from tests.support.errors import rejected
from tests.support.networks import config_of, make_codec

PATCH, Z, SIGMA, B = 2, 3, 0.2, 4
D = 3 * PATCH**2
KEYS = torch.tensor([3, -1, 2**50, 7])


def linear(likelihood: GaussianConfig | BernoulliConfig) -> Codec:
    return make_codec(config_of(LinearConfig(patch=PATCH), z=Z, likelihood=likelihood))


@pytest.fixture
def exact() -> Codec:
    """Return a linear VAE at its optimum, whose encoder gives the true posterior."""
    codec = linear(GaussianConfig(scale="fixed", sigma=SIGMA))
    root = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.2
    moments = PatchMoments(torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64), root @ root.T)
    assert torch.linalg.eigvalsh(moments.covariance)[-Z] > 1.05 * SIGMA**2  # no component is weaker than the noise
    codec.backbone.start_from_closed_form(moments, SIGMA)
    return codec


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(B, 3, 2 * PATCH, PATCH, generator=torch.Generator().manual_seed(2)) - 0.5


def marginal(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """Return log p(x) of a linear VAE, (b,) float64: patches are Gaussian with covariance W W' + sigma^2 I."""
    weight = codec.backbone.decoder.weight.detach().double().flatten(1)  # (z, d)
    covariance = weight.T @ weight + SIGMA**2 * torch.eye(D)
    mean = codec.backbone.decoder.bias.detach().double().repeat_interleave(PATCH**2)
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    patches = [x[:, :, i : i + PATCH].flatten(1).double() for i in (0, PATCH)]
    return sum((normal.log_prob(patch) for patch in patches), torch.zeros(B))


def test_with_the_true_posterior_every_weight_is_the_likelihood_of_the_image(exact: Codec, x: torch.Tensor) -> None:
    found = bounds(exact, x, KEYS, 5, at_once=64)
    expected = marginal(exact, x)
    torch.testing.assert_close(found.log_weights, expected[:, None].expand(-1, 5), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.iwae, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.effective_samples, torch.full((B,), 5.0).double(), rtol=1e-3, atol=0)


def test_with_another_posterior_more_samples_come_closer_from_below(exact: Codec, x: torch.Tensor) -> None:
    with torch.no_grad():
        exact.backbone.encoder.bias += torch.tensor([0.1, -0.1, 0.05, 0.3, 0.3, 0.3])  # means, then log-variances
    found, expected = bounds(exact, x, KEYS, 5000, at_once=20_000), marginal(exact, x)
    few = found._replace(log_weights=found.log_weights[:, :5])
    assert found.elbo.mean() < few.iwae.mean() < found.iwae.mean() and (found.iwae >= found.log_weights.mean(1)).all()
    torch.testing.assert_close(found.iwae, expected, rtol=0, atol=0.05)
    assert (found.elbo < expected - 0.1).all()
    assert (found.effective_samples > 500).all() and (found.effective_samples < 4900).all()
    ratios = found.log_likelihoods - found.log_weights
    assert ((ratios.mean(1) - found.kl).abs() < 4 * ratios.std(1) / math.sqrt(5000)).all()  # the KL in closed form


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_samples_depend_on_key_and_number_alone(exact: Codec, x: torch.Tensor, at_once: int) -> None:
    whole = bounds(exact, x, KEYS, 10, at_once=40)
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(bounds(exact, x, KEYS, 10, at_once=at_once).log_weights, whole.log_weights, **close)
    some = bounds(exact, x[2:], KEYS[2:], 3, at_once=at_once)
    torch.testing.assert_close(some.log_weights, whole.log_weights[2:, :3], **close)
    other = bounds(exact, x, KEYS + 1, 10, at_once=at_once)
    assert (other.log_likelihoods - whole.log_likelihoods).abs().amax() > 0.1


def test_binary_pixels_are_taken_as_given_or_drawn_by_the_key() -> None:
    codec = linear(BernoulliConfig())
    pixels = torch.randint(0, 256, (B, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    binary = (pixels >= 128).float()
    of_pixels, of_binary, of_others = (bounds(codec, x, KEYS, 3, at_once=64).iwae for x in (pixels, binary, 1 - binary))
    torch.testing.assert_close(of_pixels, of_binary)
    assert (of_others != of_binary).all()
    drawn, pixels = linear(BernoulliConfig(pixels="drawn")), torch.full((1, 3, 4, 4), 128, dtype=torch.uint8)
    found = [bounds(drawn, pixels, torch.tensor([key]), 3, at_once=10).log_likelihoods for key in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_no_samples_are_refused(exact: Codec, x: torch.Tensor) -> None:
    for k, at_once in ((0, 1), (1, 0)):
        rejected("at least 1", bounds, exact, x, KEYS, k, at_once=at_once)
