"""Test the ELBO against direct computations, that it averages over images, and where its gradients go."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.utils._pytree import tree_leaves

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.config import DiscretizedLogisticConfig, GaussianConfig, LikelihoodConfig, LinearConfig
from latent_codec.noise import normal
from latent_codec.prior.quantizer import dequantize, step_code
from tests.support.networks import config_of, make_codec
from tests.support.prior import quantize_plainly
from train.config.presets import photo
from train.config.vae import ELBOConfig
from train.objectives.elbo import ELBO
from train.objectives.losses import VAELosses

SIDE, PATCH, Z, B, SIGMA = 16, 4, 5, 3, 0.3
PIXELS = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LARGE = PIXELS.repeat_interleave(2, 2).repeat_interleave(2, 3)  # LPIPS needs 17 pixels
KEYS = torch.tensor([5, -7, 2**40])
X = PIXELS.double() / 127.5 - 1
FIXED = GaussianConfig(scale="fixed", sigma=SIGMA)


def linear(likelihood: LikelihoodConfig = FIXED) -> Codec:
    return make_codec(config_of(LinearConfig(patch=PATCH), z=Z, likelihood=likelihood), seed=1)


def make(lpips: LPIPS | None = None, codec: Codec | None = None, **fields: Any) -> ELBO:
    """Return the plain ELBO unless `fields` say otherwise."""
    config: ELBOConfig = dataclasses.replace(photo().objective, **{"mode_weight": 0.0, "mode_steps": None, **fields})
    return ELBO(config, codec or linear(), lpips)


def call(
    objective: ELBO, pixels: torch.Tensor = PIXELS, keys: torch.Tensor = KEYS, beta: float = 1.0, measure: bool = False
) -> VAELosses:
    return objective(pixels, keys, torch.zeros_like(keys), torch.tensor(beta), measure)


def kl_map(codec: Codec) -> torch.Tensor:
    """Return the KL (b, z, h, w) by torch.distributions."""
    posterior = codec.encode(PIXELS)
    return kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))


def gradients(objective: ELBO, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(objective.codec.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_the_loss_is_nll_plus_beta_kl_in_nats_per_image() -> None:
    objective = make()
    codec = objective.codec
    posterior = codec.encode(PIXELS)
    z = posterior.mean + posterior.std * normal(KEYS, (Z, SIDE // PATCH, SIDE // PATCH))
    nll = -Normal(codec.decode(z).double(), SIGMA).log_prob(X).sum((1, 2, 3))  # (b,)
    kl = kl_map(codec).double().sum((1, 2, 3))
    for beta in (0.0, 1.0, 3.5):
        losses = call(objective, beta=beta)
        assert losses.loss.item() == pytest.approx((nll + beta * kl).mean().item(), rel=1e-5)
        assert losses.bound.nll.item() == pytest.approx(nll.mean().item(), rel=1e-5)
        assert losses.bound.kl.item() == pytest.approx(kl.mean().item(), rel=1e-5)


def test_beta_weighs_the_gradient_of_the_kl() -> None:
    objective = make()
    encoder = list(objective.codec.backbone.encoder.parameters())
    kl = torch.autograd.grad(kl_map(objective.codec).sum() / B, encoder)
    none, more = (torch.autograd.grad(call(objective, beta=beta).loss, encoder) for beta in (0.0, 30.0))
    for before, after, wanted in zip(none, more, kl, strict=True):
        torch.testing.assert_close(after - before, 30.0 * wanted, rtol=1e-3, atol=1e-4 * float(after.abs().max()))


def test_the_nll_of_the_mode_is_added_and_teaches_the_decoder_alone() -> None:
    plain, more = make(), make(mode_weight=2.5)
    codec = more.codec
    nll = -Normal(codec.decode(codec.encode(PIXELS).mode()).double(), SIGMA).log_prob(X).sum((1, 2, 3)).mean()
    found = call(more)
    assert found.nll_mode is not None and call(plain).nll_mode is None
    losses = call(plain).loss, found.loss
    assert (losses[1] - losses[0]).item() == pytest.approx(2.5 * nll.item(), rel=1e-4)
    assert found.nll_mode.item() == pytest.approx(nll.item(), rel=1e-5)
    before, after = (gradients(o, loss) for o, loss in zip((plain, more), losses, strict=True))
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]) == name.startswith("backbone.encoder")


@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
def test_a_quantised_mode_is_that_of_the_bitstream_and_weighs_less_at_coarse_steps(step: float) -> None:
    objective = make(mode_weight=1.0, mode_steps=(step, step))  # one step, so that the draw is known
    codec, total = objective.codec, 0.0
    for i in range(B):
        posterior = codec.encode(PIXELS[i : i + 1])
        std = posterior.logvar.double().exp().mean((0, 2, 3)).sqrt()  # of this image, per channel
        base = (math.sqrt(12) * std).detach().numpy().astype(np.float32)
        quantized = quantize_plainly(posterior.mean[0], base, step_code(step), None)
        decoded = codec.decode(dequantize(quantized, base)[None])
        total -= Normal(decoded.double(), SIGMA).log_prob(X[i : i + 1]).sum().item()
    found = call(objective).nll_mode
    assert found is not None and found.item() == pytest.approx(total / B / max(1.0, step) ** 2, rel=1e-4)


def test_steps_of_the_mode_are_drawn_for_each_image_evenly_in_the_logarithm() -> None:
    objective = make(mode_weight=1.0, mode_steps=(1.0, 9.0))
    posterior = objective.codec.encode(PIXELS[:1].expand(300, -1, -1, -1))
    _, weight = objective.decoded_mode(posterior, torch.arange(300))
    step = weight.rsqrt()
    assert 1.0 <= step.min() < 1.1 and 8.5 < step.max() <= 9.0
    assert step.log().mean().item() == pytest.approx(math.log(3), abs=0.12)
    assert torch.equal(weight, objective.decoded_mode(posterior, torch.arange(300))[1])


@pytest.mark.parametrize("fields", [{}, {"free_bits": 0.05}, {"lpips_weight": 3.0}])
def test_losses_and_gradients_are_means_over_images(fields: dict[str, float], request: pytest.FixtureRequest) -> None:
    """This lets processes and micro-batches average."""
    objective = make(request.getfixturevalue("lpips") if "lpips_weight" in fields else None, **fields)
    pixels = LARGE if "lpips_weight" in fields else PIXELS
    singles = [call(objective, p[None], k[None], 2.0, True) for p, k in zip(pixels, KEYS, strict=True)]
    whole = call(objective, pixels, beta=2.0, measure=True)
    for one, *parts in zip(*map(tree_leaves, (whole, *singles)), strict=True):
        if one is not None:
            torch.testing.assert_close(one, torch.stack(parts).mean(0), rtol=1e-5, atol=1e-6)
    parts = [gradients(objective, single.loss) for single in singles]
    for name, gradient in gradients(objective, whole.loss).items():
        mean = torch.stack([p[name] for p in parts]).mean(0)
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max()))


def test_the_expectation_over_noise_is_the_negative_elbo() -> None:
    """One sample is an unbiased estimate: E |x - D(m + s e)|^2 = |x - D(m)|^2 + sum of s_i^2 |D e_i|^2."""
    objective = make()
    codec, image = objective.codec, PIXELS[:1]
    with torch.no_grad():
        estimates = [call(objective, image.expand(50, -1, -1, -1), part) for part in torch.arange(2000).split(50)]
    losses = torch.stack([e.loss for e in estimates]).double()
    x, posterior = codec.likelihood.from_uint8(image), codec.encode(image)
    error = (x - codec.decode(posterior.mean)).square().sum()
    columns = codec.backbone.decoder.weight.square().sum((1, 2, 3))  # (z,) |D e_i|^2
    error = error + (posterior.std.square() * columns[:, None, None]).sum()
    nll = 0.5 * error / SIGMA**2 + x.numel() * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi))
    expected, spread = nll.item() + posterior.kl().item(), losses.std().item() / math.sqrt(len(losses))
    assert 0 < spread < 1e-3 * abs(expected) and losses.mean().item() == pytest.approx(expected, abs=5 * spread)


def test_noise_follows_the_key_not_the_place_in_the_batch() -> None:
    objective, order = make(), torch.tensor([2, 0, 1])
    torch.manual_seed(0)
    one = call(objective)
    torch.manual_seed(1)
    assert one.loss.item() == pytest.approx(call(objective, PIXELS[order], KEYS[order]).loss.item(), rel=1e-6)
    assert call(objective, keys=KEYS + 1).bound.nll.item() != one.bound.nll.item()


def test_free_bits_charge_each_channel_of_each_image_at_least_their_price_without_a_gradient_below_it() -> None:
    per_channel = kl_map(make().codec).mean((2, 3)).detach()  # (b, z) nats per element
    price = per_channel.median().item()
    objective = make(free_bits=price)
    free = call(objective)
    charged = torch.maximum(per_channel, torch.tensor(price)).sum(1) * (SIDE // PATCH) ** 2
    assert free.loss.item() - free.bound.nll.item() == pytest.approx(charged.mean().item(), rel=1e-3)
    assert free.bound.kl.item() == call(make()).bound.kl.item()  # the KL itself is reported
    raw = (torch.zeros(B, Z, SIDE // PATCH, SIDE // PATCH) + per_channel[..., None, None]).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.charged_kl(raw), raw)
    below = (per_channel < price)[..., None, None].expand_as(raw)
    assert below.any() and not below.all()
    assert not gradient[below].any()
    torch.testing.assert_close(
        gradient[~below & (per_channel > price)[..., None, None]].unique(), torch.tensor([1 / B])
    )


def test_only_the_loss_has_a_gradient() -> None:
    losses = call(make(mode_weight=1.0), measure=True)
    assert losses.loss.requires_grad
    assert not any(value.requires_grad for value in tree_leaves(losses._replace(loss=None)) if value is not None)


@pytest.mark.parametrize("likelihood", [FIXED, DiscretizedLogisticConfig(components=1)])
def test_the_mse_is_that_of_the_expected_pixels_where_it_is_measured(likelihood: LikelihoodConfig) -> None:
    objective = make(codec=linear(likelihood))
    codec = objective.codec
    z = codec.encode(PIXELS).sample(normal(KEYS, (Z, SIDE // PATCH, SIDE // PATCH)))
    error = (codec.decode(z).double() + 1) / 2 - PIXELS.double() / 255
    found = call(objective, measure=True).bound.mse.item()
    assert found == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert math.isnan(call(objective).bound.mse.item())


def test_the_posteriors_moments_and_clamped_share_are_reported() -> None:
    objective = make()
    mean = objective.codec.encode(PIXELS).mean
    bound = call(objective).bound
    torch.testing.assert_close(bound.latent_mean, mean.mean((0, 2, 3)))
    torch.testing.assert_close(bound.latent_square, mean.square().mean((0, 2, 3)))
    assert bound.clamped.item() == 0.0
    with torch.no_grad():
        objective.codec.backbone.encoder.bias[Z] = 100.0  # the first channel's logvar
    assert call(objective).bound.clamped.item() == pytest.approx(1 / Z)


def test_under_autocast_the_loss_stays_float32_and_near() -> None:
    objective = make()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = call(objective)
    assert all(value.dtype == torch.float32 for value in tree_leaves(coarse) if value is not None)
    assert coarse.loss.item() == pytest.approx(call(objective).loss.item(), rel=1e-2)


def test_lpips_adds_its_weight_per_pixel_and_real_gradients_to_the_decoder_alone(lpips: LPIPS) -> None:
    codec = linear()
    with_lpips = make(lpips, codec, lpips_weight=2.0)
    one, other = call(with_lpips, LARGE), call(make(codec=codec), LARGE)
    posterior = codec.encode(LARGE)
    z = posterior.sample(normal(KEYS, tuple(posterior.mean.shape[1:])))
    distance = lpips(codec.decode(z), LARGE.float() / 127.5 - 1).mean()
    assert one.lpips is not None and other.lpips is None
    assert one.lpips.item() == pytest.approx(distance.item(), rel=1e-5) and one.lpips.item() > 0.1
    assert one.loss.item() - other.loss.item() == pytest.approx(2.0 * 32 * 32 * distance.item(), rel=1e-3)
    # A small step of the decoder's bias against the term's gradient lowers the term by as much as the gradient says.
    bias = codec.backbone.decoder.bias
    (gradient,) = torch.autograd.grad(one.loss - other.loss, [bias])
    assert gradient.abs().min() > 0
    step = 1e-3 / gradient.norm()
    with torch.no_grad():
        bias -= step * gradient
    lower = call(with_lpips, LARGE).lpips
    assert lower is not None
    change = (lower - one.lpips).item() * 2.0 * 32 * 32
    assert change == pytest.approx(-float(step * gradient.square().sum()), rel=0.1)
    trained = {id(p) for p in with_lpips.parameters() if p.requires_grad}
    assert trained == {id(p) for p in codec.parameters()}
    assert codec.state_dict().keys() == linear().state_dict().keys()
