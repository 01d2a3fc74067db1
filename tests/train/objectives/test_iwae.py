"""Test the importance-weighted bound: its expectation, its order in the number of samples, and its gradient."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from latent_codec.model.codec import Codec
from latent_codec.model.config import GaussianConfig, LinearConfig
from latent_codec.noise import normal
from tests.support.networks import config_of, make_codec
from train.config.presets import mnist_vae
from train.config.vae import IWAEConfig
from train.objectives.elbo import ELBO
from train.objectives.iwae import IWAE, resampled

SIDE, Z, SIGMA = 2, 2, 0.5
KEYS = torch.arange(4)
PIXELS = torch.randint(0, 256, (4, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def linear() -> Codec:
    """Return a codec with p(x given z) = N(W z + b, sigma^2), so that p(x) is a Gaussian."""
    likelihood = GaussianConfig(scale="fixed", sigma=SIGMA)
    return make_codec(config_of(LinearConfig(patch=SIDE), c=1, z=Z, likelihood=likelihood), seed=1)


def exact_nll(codec: Codec) -> torch.Tensor:
    with torch.no_grad():
        weight = codec.backbone.decoder.weight.reshape(Z, -1).double()  # (z, d)
        bias = codec.backbone.decoder.bias.double().expand(SIDE * SIDE)
        covariance = weight.T @ weight + SIGMA**2 * torch.eye(SIDE * SIDE, dtype=torch.float64)
        x = codec.likelihood.from_uint8(PIXELS).flatten(1).double()
        return -MultivariateNormal(bias, covariance).log_prob(x)


def call(
    codec: Codec, samples: int, pixels: torch.Tensor = PIXELS, keys: torch.Tensor = KEYS, few: int = 0
) -> torch.Tensor:
    """Return the loss of IWAE; with no samples, that of the ELBO."""
    objective = IWAE(IWAEConfig(samples=samples, gradient_samples=few), codec)
    if samples == 0:
        objective = ELBO(mnist_vae().objective, codec, None)  # pyright: ignore[reportArgumentType]
    return objective(pixels, keys, torch.zeros_like(keys), torch.tensor(1.0), False).loss


def test_one_sample_is_the_elbo_in_expectation() -> None:
    codec, many = linear(), torch.arange(20_000)
    image = PIXELS[:1].expand(1000, -1, -1, -1)
    with torch.no_grad():
        found = torch.stack([call(codec, 1, image, keys) for keys in many.split(1000)])
        elbo = torch.stack([call(codec, 0, image, keys) for keys in many.split(1000)])
    spread = (found.std() + elbo.std()).item() / math.sqrt(len(found))
    assert found.mean().item() == pytest.approx(elbo.mean().item(), abs=4 * spread)
    assert spread < 0.02 * elbo.mean().item()


def test_more_samples_tighten_the_training_bound() -> None:
    codec, many = linear(), torch.arange(2_000)
    image = PIXELS[:1].expand(2000, -1, -1, -1)
    with torch.no_grad():
        losses = [call(codec, k, image, many).item() for k in (1, 5, 50)]
    assert losses[0] > losses[1] + 0.01 and losses[1] > losses[2] + 0.01
    assert losses[2] > exact_nll(codec)[0].item() - 0.01


def test_the_gradient_is_that_of_the_weighted_samples() -> None:
    """Burda et al. (2016), eq. 14: the average of grad log w_i under the normalised weights."""
    codec = linear()
    decoder = list(codec.backbone.decoder.parameters())
    found = torch.autograd.grad(call(codec, 3, PIXELS[:1], KEYS[:1]), decoder)
    x = codec.likelihood.from_uint8(PIXELS[:1])
    posterior = codec.encode(x)
    noise = normal(KEYS[:1], (3, *posterior.mean.shape[1:]))[0]
    logs = [
        codec.likelihood.log_prob(codec.likelihood_params(z), x)[0] + posterior.log_ratio(z)[0]
        for z in (posterior.mean + posterior.std * n for n in noise)
    ]
    weights = torch.softmax(torch.stack(logs).detach(), 0)
    parts = [torch.autograd.grad(log, decoder, retain_graph=True) for log in logs]
    for i, gradient in enumerate(found):
        expected = -sum(w * part[i] for w, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_through_a_few_samples_is_that_of_all_on_average() -> None:
    codec, many = linear(), torch.arange(20_000)
    image = PIXELS[:1].expand(len(many), -1, -1, -1)
    parameters = list(codec.parameters())

    losses = [call(codec, 6, image, many, few) for few in (0, 1, 2)]
    exact, *others = [torch.autograd.grad(loss, parameters) for loss in losses]
    size = max(g.abs().max().item() for g in exact)
    for found, expected in zip(others, [exact] * 2, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03 * size)
    assert [loss.item() for loss in losses[1:]] == pytest.approx([losses[0].item()] * 2, rel=1e-5)  # the bound
    other = torch.autograd.grad(call(codec, 0, image, many), parameters)
    difference = max((a - b).abs().max().item() for a, b in zip(other, exact, strict=True))
    assert difference > 0.1 * size  # the samples' weights matter


@pytest.mark.parametrize("n", [1, 3, 7])
def test_samples_are_drawn_by_their_weights(n: int) -> None:
    """A sample is drawn floor(n w) or ceil(n w) times, and n w times on average."""
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
    offset = (torch.arange(1000) + 0.5) / 1000
    drawn = resampled(weights.log()[:, None].expand(-1, 1000) + 80, n, offset)  # weights need no common scale
    assert drawn.shape == (n, 1000)
    counts = torch.stack([(drawn == i).sum(0) for i in range(4)]).double()  # (4, 1000)
    torch.testing.assert_close(counts.mean(1).float(), n * weights, rtol=0, atol=2e-3)
    assert bool((counts >= (n * weights).floor()[:, None]).all() and (counts <= (n * weights).ceil()[:, None]).all())


@pytest.mark.parametrize("offset", [0.0, 1 - 2.0**-53])
def test_one_sample_decides_where_the_others_weigh_nothing(offset: float) -> None:
    drawn = resampled(torch.tensor([[-1e4], [0.0], [-1e4]]), 4, torch.tensor([offset], dtype=torch.float64))
    assert drawn.flatten().tolist() == [1] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_make_a_loss_that_is_not_and_choose_valid_samples(bad: float) -> None:
    drawn = resampled(torch.full((3, 2), bad), 2, torch.tensor([0.0, 0.9]))
    assert bool(((drawn >= 0) & (drawn < 3)).all())
    codec = linear()
    with torch.no_grad():
        codec.backbone.decoder.bias.fill_(bad)
    assert not torch.isfinite(call(codec, 3, few=2))
