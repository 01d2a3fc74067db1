"""Likelihoods: normalised, exact against references, finite at the extremes, and strict about pixel ranges."""

import math

import pytest
import torch
from torch import nn

from latent_codec.model.config import BernoulliConfig, DiscretizedLogisticConfig, GaussianConfig
from latent_codec.model.likelihoods import LIKELIHOODS, Bernoulli, DiscretizedLogistic, Gaussian, Likelihood
from tests.support.errors import refused, rejected
from tests.support.networks import seeded

VALUES = torch.arange(256, dtype=torch.uint8)

ALL: dict[str, Likelihood] = {
    "gaussian fixed": Gaussian(GaussianConfig(scale="fixed", sigma=0.1)),
    "gaussian learned": Gaussian(GaussianConfig(scale="learned", sigma=0.1)),
    "gaussian per pixel": Gaussian(GaussianConfig(scale="per_pixel", sigma=0.1)),
    "logistic": DiscretizedLogistic(DiscretizedLogisticConfig(components=1)),
    "mixture": DiscretizedLogistic(DiscretizedLogisticConfig(components=5)),
    "bernoulli": Bernoulli(BernoulliConfig()),
}
SIGNED = [name for name in ALL if name != "bernoulli"]
COMPONENTS = {"logistic": 1, "mixture": 5}
DISCRETE = list(COMPONENTS)

everyone = pytest.mark.parametrize("name", ALL)
autocast_types = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def test_every_registered_likelihood_is_tested_here() -> None:
    assert {type(likelihood) for likelihood in ALL.values()} == set(LIKELIHOODS.values())


def random_params(name: str, b: int, c: int, h: int, w: int) -> torch.Tensor:
    return 0.7 * torch.randn((b, ALL[name].params_per_channel * c, h, w), generator=seeded(0))


def random_pixels(name: str, *shape: int) -> torch.Tensor:
    return ALL[name].from_uint8(torch.randint(0, 256, shape, generator=seeded(1), dtype=torch.uint8))


def logistic_params(n: int, components: int, seed: int) -> torch.Tensor:
    """Return (1, p, 1, n): locations in [-6, 6], a third of them at bin edges or far outside; log scales in [-7, 3]."""
    generator = seeded(seed)
    location = 12 * torch.rand((components, n), generator=generator) - 6
    edges = (torch.randint(0, 255, (components, n), generator=generator) + 0.5) / 127.5 - 1
    location[:, : n // 3] = edges[:, : n // 3]
    location[:, n // 3 : n // 2] *= 100
    log_scale = 10 * torch.rand((components, n), generator=generator) - 7
    log_scale[:, : n // 6] = -7.0
    parts = [location, log_scale]
    if components > 1:
        parts.append(3 * torch.randn((components, n), generator=generator))
    return torch.cat(parts)[None, :, None]


def all_probabilities(likelihood: Likelihood, params: torch.Tensor) -> torch.Tensor:
    """Return (256, n), the probability of every pixel value under one-channel parameters (1, p, 1, n)."""
    n = params.shape[-1]
    x = likelihood.from_uint8(VALUES).repeat_interleave(n).reshape(256 * n, 1, 1, 1)
    tiled = params[0, :, 0].T.repeat(256, 1)[:, :, None, None]  # (256 * n, p, 1, 1)
    return likelihood.log_prob(tiled, x).exp().reshape(256, n)


def reference_probabilities(params: torch.Tensor, components: int) -> torch.Tensor:
    """Return (256, n) in float64 from differences of the logistic CDF, with open end bins."""
    p = params[0, :, 0].double()  # (p, n)
    location, log_scale = p[:components], p[components : 2 * components].clamp(-7, 7)
    weight = torch.softmax(p[2 * components :], 0) if components > 1 else torch.ones_like(location)
    edges = (torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1
    cdf = torch.sigmoid((edges[:, None, None] - location) * (-log_scale).exp())  # (255, k, n)
    zero, one = torch.zeros_like(cdf[:1]), torch.ones_like(cdf[:1])
    return (torch.cat([cdf, one]) - torch.cat([zero, cdf])).mul(weight).sum(1)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_256_probabilities_sum_to_one(name: str, dtype: torch.dtype) -> None:
    params = logistic_params(600, COMPONENTS[name], seed=0).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        total = all_probabilities(ALL[name], params).double().sum(0)
    assert (total - 1).abs().amax().item() < 2e-6


@pytest.mark.parametrize("name", DISCRETE)
def test_each_probability_is_the_logistic_mass_of_its_bin_the_end_bins_open(name: str) -> None:
    params = logistic_params(600, COMPONENTS[name], seed=1)
    found, expected = all_probabilities(ALL[name], params).double(), reference_probabilities(params, COMPONENTS[name])
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_log_probabilities_keep_their_digits_in_both_tails() -> None:
    likelihood = ALL["logistic"]
    for location in (-0.5, 0.5):
        for value in (20, 235):
            x = likelihood.from_uint8(torch.tensor(value, dtype=torch.uint8)).reshape(1, 1, 1, 1)
            found = likelihood.log_prob(torch.tensor([location, -5.0]).reshape(1, 2, 1, 1), x).item()
            near = abs(value / 127.5 - 1 - location) - 1 / 255  # in the tail the mass is e^-near (1 - e^-width)
            expected = -near * math.exp(5) + math.log(-math.expm1(-2 / 255 * math.exp(5)))
            expected += -2 * math.log1p(math.exp(-near * math.exp(5)))
            assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", DISCRETE)
def test_a_discretized_mean_is_the_sum_of_values_times_probabilities(name: str) -> None:
    likelihood = ALL[name]
    params = logistic_params(300, COMPONENTS[name], seed=2)
    values = likelihood.from_uint8(VALUES).double()
    expected = (values[:, None] * all_probabilities(likelihood, params).double()).sum(0)
    torch.testing.assert_close(likelihood.mean(params).double().flatten(), expected, rtol=0, atol=2e-5)
    assert likelihood.mean(params).abs().amax().item() <= 1 + 1e-5


@pytest.mark.parametrize("name", DISCRETE)
def test_discretized_samples_have_the_probabilities_as_frequencies(name: str) -> None:
    likelihood, components, n = ALL[name], COMPONENTS[name], 40_000
    for seed in range(3):
        params = logistic_params(1, components, seed=seed)
        params[:, :components] = torch.linspace(-1.1, 0.8, components)[None, :, None, None]
        params[:, components : 2 * components] = -2.5
        drawn = likelihood.sample(params.expand(n, -1, 1, 1), seeded(seed))
        likelihood.check(drawn)
        frequency = torch.bincount(likelihood.to_uint8(drawn).long().flatten(), minlength=256).double() / n
        expected = all_probabilities(likelihood, params)[:, 0].double()
        assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt() + 2 / n).all()


def distribution(name: str, params: torch.Tensor) -> torch.distributions.Distribution:
    """Return torch's own distribution of pixels (b, c, h, w) given params (b, p * c, h, w), in float64."""
    if name == "bernoulli":
        return torch.distributions.Bernoulli(logits=params.double())
    mean, *log_scale = params.double().chunk(ALL[name].params_per_channel, 1)
    return torch.distributions.Normal(mean, 0.1 * (log_scale[0].exp() if log_scale else torch.ones(())))


@pytest.mark.parametrize("name", [name for name in ALL if name not in COMPONENTS])
def test_log_prob_mean_and_samples_are_those_of_torch_distributions(name: str) -> None:
    likelihood = ALL[name]
    params, x = random_params(name, 3, 2, 4, 5), random_pixels(name, 3, 2, 4, 5)
    expected = distribution(name, params)
    log_prob = expected.log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(params, x).double(), log_prob, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(likelihood.mean(params).double(), expected.mean, rtol=1e-5, atol=1e-6)
    n, one = 40_000, params[:1, :, :1, :2]
    drawn, expected = likelihood.sample(one.expand(n, -1, -1, -1), seeded(0)).double(), distribution(name, one)
    assert ((drawn.mean(0) - expected.mean).abs() < 4 * expected.stddev / math.sqrt(n)).all()
    if name == "bernoulli":
        likelihood.check(drawn)
    else:
        assert ((drawn.std(0) / expected.stddev - 1).abs() < 4 / math.sqrt(2 * n)).all()


@everyone
def test_only_a_learned_sigma_is_trained_and_stored_and_it_is_one_scalar(name: str) -> None:
    assert [p.numel() for p in ALL[name].parameters()] == ([1] if name == "gaussian learned" else [])
    assert set(nn.Module.state_dict(ALL[name])) == {n for n, _ in ALL[name].named_parameters()}


def test_the_best_learned_sigma_is_the_root_mean_squared_error() -> None:
    likelihood = Gaussian(GaussianConfig(scale="learned", sigma=0.2))
    error = 0.2 * torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    likelihood.log_prob(error, torch.zeros_like(error)).sum().backward()
    (parameter,) = likelihood.parameters()
    assert parameter.grad is not None and parameter.grad.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("trade_off", "sigma"),
    [(0.0018, 0.272), (0.0035, 0.195), (0.0067, 0.141), (0.0130, 0.101), (0.0250, 0.073), (0.0483, 0.0525)],
)
def test_a_fixed_sigma_is_the_stated_lambda_of_rate_plus_distortion(trade_off: float, sigma: float) -> None:
    """Nats over those of a perfect reconstruction are lambda 255^2 MSE bits per pixel, for pixels in [0, 1]."""
    likelihood = Gaussian(GaussianConfig(scale="fixed", sigma=sigma))
    x, y = 2 * torch.rand((2, 1, 3, 4, 5), generator=seeded(0)) - 1
    bits_per_pixel = (likelihood.log_prob(x, x) - likelihood.log_prob(y, x)).item() / math.log(2) / (4 * 5)
    mse = ((y - x) / 2).square().mean().item()
    assert bits_per_pixel == pytest.approx(trade_off * 255**2 * mse, rel=0.01)  # the table has three digits


def test_drawn_pixels_are_one_as_often_as_they_are_bright_and_follow_the_key() -> None:
    likelihood = Bernoulli(BernoulliConfig(pixels="drawn"))
    pixels = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).expand(4000, 1, 1, 4)
    keys = torch.arange(4000)
    x = likelihood.observe(pixels, keys)
    likelihood.check(x)
    mean = x.mean((0, 1, 2))
    assert mean[0] == 0 and mean[3] == 1
    assert mean[1:3].tolist() == pytest.approx([0.2, 128 / 255], abs=5 * 0.5 / 4000**0.5)
    assert torch.equal(likelihood.observe(pixels[:3], keys[[7, 2, 9]]), x[[7, 2, 9]])
    assert not torch.equal(likelihood.observe(pixels, keys + 4000), x)


@everyone
def test_other_pixels_do_not_depend_on_keys(name: str) -> None:
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(1, 1, 1, 4)
    assert torch.equal(ALL[name].observe(pixels, torch.tensor([5])), ALL[name].from_uint8(pixels))


@everyone
def test_log_prob_is_summed_over_features_and_not_over_the_batch_or_several_latents_of_an_image(name: str) -> None:
    likelihood = ALL[name]
    params, x = random_params(name, 3, 2, 4, 6), random_pixels(name, 3, 2, 4, 6)
    whole = likelihood.log_prob(params, x)
    assert whole.shape == (3,)
    images = [likelihood.log_prob(params[i : i + 1], x[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(images))
    halves = [likelihood.log_prob(params[..., part], x[..., part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(whole, halves[0] + halves[1])
    per_parameter = params.unflatten(1, (likelihood.params_per_channel, 2))
    channels = [likelihood.log_prob(per_parameter[:, :, i], x[:, i : i + 1]) for i in range(2)]
    torch.testing.assert_close(whole, channels[0] + channels[1])
    several = random_params(name, 15, 2, 4, 6)
    torch.testing.assert_close(likelihood.log_prob(several, x), likelihood.log_prob(several, x.repeat(5, 1, 1, 1)))


@everyone
@autocast_types
def test_autocast_changes_no_result(name: str, dtype: torch.dtype) -> None:
    likelihood = ALL[name]
    params, x = random_params(name, 2, 3, 16, 16), random_pixels(name, 2, 3, 16, 16)
    with torch.autocast("cpu", dtype=dtype):
        found = likelihood.log_prob(params, x), likelihood.mean(params), likelihood.sample(params, seeded(0))
    plain = likelihood.log_prob(params, x), likelihood.mean(params), likelihood.sample(params, seeded(0))
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@everyone
@autocast_types
def test_at_extreme_parameters_under_autocast_everything_is_finite(name: str, dtype: torch.dtype) -> None:
    likelihood, p = ALL[name], ALL[name].params_per_channel
    signs = torch.randn((64, p), generator=seeded(0)).sign()
    signs[:2] = torch.tensor([[1.0], [-1.0]])
    params = (1e4 * signs)[:, :, None, None].expand(-1, -1, 2, 2).clone().requires_grad_()  # (64, p, 2, 2)
    pixels = torch.tensor([[0, 1], [128, 255]], dtype=torch.uint8)
    x = likelihood.from_uint8(pixels.expand(64, 1, 2, 2))
    with torch.autocast("cpu", dtype=dtype):
        likelihood.log_prob(params, x).sum().backward()
        coarse = params.detach().to(dtype)
        results = likelihood.log_prob(coarse, x), likelihood.mean(coarse), likelihood.sample(coarse, seeded(0))
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in results)
    assert params.grad is not None and params.grad.isfinite().all()


@everyone
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_image_of_output_that_is_not_finite_is_refused(name: str, value: float) -> None:
    likelihood, params = ALL[name], random_params(name, 2, 3, 4, 5)
    huge = (params * 1e38).clamp(-3e38, 3e38)  # whose sum is not finite
    for sound in (params, huge.abs()):
        assert torch.equal(likelihood.checked_mean(sound), likelihood.mean(sound))
    params[1, 0, 2, 3] = value
    refused("the decoder's output is not finite; try", likelihood.checked_mean, params)


@everyone
def test_the_gradient_of_log_prob_is_that_of_finite_differences(name: str) -> None:
    likelihood = ALL[name]
    params, x = random_params(name, 1, 1, 2, 3).requires_grad_(), random_pixels(name, 1, 1, 2, 3)
    (gradient,) = torch.autograd.grad(likelihood.log_prob(params, x).sum(), params)
    direction = torch.randn(params.shape, generator=seeded(3))
    step = 1e-2
    ahead, behind = (likelihood.log_prob(params.detach() + s * step * direction, x).item() for s in (1, -1))
    assert (ahead - behind) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=0.02, abs=0.02)


@pytest.mark.parametrize("name", SIGNED)
def test_uint8_survives_the_round_trip_and_other_values_are_rounded_and_clipped(name: str) -> None:
    likelihood = ALL[name]
    x = likelihood.from_uint8(VALUES)
    assert x.dtype == torch.float32 and (x[0].item(), x[255].item()) == likelihood.data_range
    likelihood.check(x)
    assert torch.equal(likelihood.to_uint8(x), VALUES)
    grey = torch.linspace(-50, 300, 10_001)
    error = likelihood.to_uint8(grey / 127.5 - 1).float() - grey.clamp(0, 255)
    assert error.abs().amax().item() <= 0.5 + 1e-4


def test_bernoulli_pixels_are_one_from_128_up() -> None:
    x = ALL["bernoulli"].from_uint8(VALUES)
    ALL["bernoulli"].check(x)
    assert torch.equal(x, (torch.arange(256) >= 128).float())
    assert torch.equal(ALL["bernoulli"].from_uint8(ALL["bernoulli"].to_uint8(x)), x)


def pixels_of_the_wrong_range(name: str) -> dict[str, torch.Tensor]:
    ramp = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    wrong = {
        "0..255": ramp,
        "uint8": ramp.to(torch.uint8),
        "slightly beyond": ramp / 127 - 1,
        "NaN": torch.where(ramp == 7, math.nan, ALL[name].from_uint8(ramp.to(torch.uint8))),
        "infinite": torch.where(ramp == 7, math.inf, ALL[name].from_uint8(ramp.to(torch.uint8))),
    }
    if name in DISCRETE:
        wrong |= {"0..1": ramp / 255, "between values": ramp / 128 - 1}
    if name == "bernoulli":
        wrong |= {"-1..1": ramp / 127.5 - 1, "0..1": ramp / 255, "signs": torch.sign(ramp - 127.5)}
    else:
        wrong |= {"dark uint8": torch.zeros((1, 1, 16, 16), dtype=torch.uint8)}
    return wrong


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in ALL for case in pixels_of_the_wrong_range(name)])
def test_pixels_of_another_range_are_an_error_with_the_likelihood_and_the_remedy(name: str, case: str) -> None:
    x = pixels_of_the_wrong_range(name)[case]
    params = torch.zeros((1, ALL[name].params_per_channel, 16, 16))
    kind = next(kind for kind, cls in LIKELIHOODS.items() if isinstance(ALL[name], cls))
    rejected(rf"{kind}.*found .*from_uint8", ALL[name].log_prob, params, x)


@everyone
def test_samples_depend_on_the_generator_alone(name: str) -> None:
    params = random_params(name, 2, 3, 4, 5)
    state = torch.get_rng_state()
    first = ALL[name].sample(params, seeded(4))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, ALL[name].sample(params, seeded(4)))
    assert not torch.equal(first, ALL[name].sample(params, seeded(5))) and first.shape == (2, 3, 4, 5)
