"""The ELBO: equal to a direct computation, an average over images, and its terms' gradients."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.config import (
    CodecConfig,
    DiagonalGaussianConfig,
    DiscretizedLogisticConfig,
    GaussianConfig,
    LinearConfig,
)
from latent_codec.noise import normal
from latent_codec.prior.quantizer import dequantize, step_code
from tests.support.plain_integers import quantize
from train.config.presets import photo
from train.config.vae import ELBOConfig
from train.objectives.elbo import ELBO
from train.objectives.losses import Losses

SIDE, PATCH, Z, B, SIGMA = 16, 4, 5, 3, 0.3


def make_codec(likelihood: Any = None) -> Codec:
    config = CodecConfig(
        image_channels=3,
        latent_channels=Z,
        backbone=LinearConfig(patch=PATCH),
        bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
        likelihood=likelihood or GaussianConfig(scale="fixed", sigma=SIGMA),
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Codec(config)


def make(lpips: LPIPS | None = None, codec: Codec | None = None, **fields: Any) -> ELBO:
    """The plain ELBO unless `fields` say otherwise."""
    config: ELBOConfig = dataclasses.replace(photo().objective, **{"mode_weight": 0.0, "mode_steps": None, **fields})
    return ELBO(config, codec or make_codec(), lpips)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (b, 3, h, w) uint8 and keys (b,)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (B, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return pixels, torch.tensor([5, -7, 2**40])


def call(objective: ELBO, batch: tuple[torch.Tensor, torch.Tensor], beta: float = 1.0, measure: bool = False) -> Losses:
    return objective(*batch, torch.zeros_like(batch[1]), torch.tensor(beta), measure)


def kl_map(codec: Codec, pixels: torch.Tensor) -> torch.Tensor:
    """(b, z, h, w) by torch.distributions."""
    posterior = codec.encode(pixels)
    return kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))


def gradients(objective: ELBO, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(objective.codec.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def test_the_loss_is_nll_plus_beta_kl_in_nats_per_image(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective = make()
    codec, (pixels, keys) = objective.codec, batch
    x = pixels.double() / 127.5 - 1
    posterior = codec.encode(pixels)
    z = posterior.mean + posterior.std * normal(keys, (Z, SIDE // PATCH, SIDE // PATCH))
    nll = -Normal(codec.decode(z).double(), SIGMA).log_prob(x).sum((1, 2, 3))  # (b,)
    kl = kl_map(codec, pixels).double().sum((1, 2, 3))
    for beta in (0.0, 1.0, 3.5):
        losses = call(objective, batch, beta)
        assert losses.loss.item() == pytest.approx((nll + beta * kl).mean().item(), rel=1e-5)
        assert losses.nll.item() == pytest.approx(nll.mean().item(), rel=1e-5)
        assert losses.kl.item() == pytest.approx(kl.mean().item(), rel=1e-5)


def test_the_modes_nll_is_added_and_teaches_the_decoder_alone(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    plain, more = make(), make(mode_weight=2.5)
    codec, x = more.codec, batch[0].double() / 127.5 - 1
    nll = -Normal(codec.decode(codec.encode(batch[0]).mode()).double(), SIGMA).log_prob(x).sum((1, 2, 3)).mean()
    losses = call(plain, batch).loss, call(more, batch).loss
    assert (losses[1] - losses[0]).item() == pytest.approx(2.5 * nll.item(), rel=1e-4)
    assert call(more, batch).nll_mode.item() == pytest.approx(nll.item(), rel=1e-5)
    before, after = (gradients(o, loss) for o, loss in zip((plain, more), losses, strict=True))
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]) == name.startswith("backbone.encoder")


def test_a_quantised_mode_is_that_of_the_bitstream_and_weighs_less_at_coarse_steps(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """A range of one step, so that what is drawn is known."""
    x = batch[0].double() / 127.5 - 1
    for step in (0.5, 1.0, 3.0):
        objective = make(mode_weight=1.0, mode_steps=(step, step))
        codec, total = objective.codec, 0.0
        for i in range(B):
            posterior = codec.encode(batch[0][i : i + 1])
            std = posterior.logvar.double().exp().mean((0, 2, 3)).sqrt()  # of this image, per channel
            base = (math.sqrt(12) * std).detach().numpy().astype(np.float32)
            quantized = quantize(posterior.mean[0], base, step_code(step), None)
            decoded = codec.decode(dequantize(quantized, base)[None])
            total -= Normal(decoded.double(), SIGMA).log_prob(x[i : i + 1]).sum().item()
        expected = total / B / max(1.0, step) ** 2
        assert call(objective, batch).nll_mode.item() == pytest.approx(expected, rel=1e-4)


def test_steps_of_the_mode_are_drawn_for_each_image_between_the_two(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective = make(mode_weight=1.0, mode_steps=(1.0, 9.0))
    pixels = batch[0][:1].expand(300, -1, -1, -1)
    posterior = objective.codec.encode(pixels)
    _, weight = objective._decoded_mode(posterior, torch.arange(300))
    step = weight.rsqrt()
    assert 1.0 <= step.min() < 1.1 and 8.5 < step.max() <= 9.0
    assert step.log().mean().item() == pytest.approx(math.log(3), abs=0.12)  # evenly in the logarithm
    again = objective._decoded_mode(posterior, torch.arange(300))[1]
    assert torch.equal(weight, again)


def test_beta_weighs_the_gradient_of_the_kl(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective = make()
    encoder = list(objective.codec.backbone.encoder.parameters())
    kl = torch.autograd.grad(kl_map(objective.codec, batch[0]).sum() / B, encoder)
    none, more = (torch.autograd.grad(call(objective, batch, beta).loss, encoder) for beta in (0.0, 30.0))
    for before, after, wanted in zip(none, more, kl, strict=True):
        torch.testing.assert_close(after - before, 30.0 * wanted, rtol=1e-3, atol=1e-4 * float(after.abs().max()))


@pytest.mark.parametrize("free_bits", [0.0, 0.05])
def test_a_batchs_loss_and_gradient_are_the_means_of_its_images(
    batch: tuple[torch.Tensor, torch.Tensor], free_bits: float
) -> None:
    """What lets ranks and micro-batches average."""
    objective = make(free_bits=free_bits)
    singles = [call(objective, (p[None], k[None]), 2.0, True) for p, k in zip(*batch, strict=True)]
    whole = call(objective, batch, 2.0, True)
    for one, parts in zip(whole, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(parts).mean(0), rtol=1e-5, atol=1e-6)
    parts = [gradients(objective, single.loss) for single in singles]
    for name, gradient in gradients(objective, whole.loss).items():
        mean = torch.stack([p[name] for p in parts]).mean(0)
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max()))


def test_the_expectation_over_noise_is_the_negative_elbo(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Law 7: one sample is an unbiased estimate; E |x - D(m + s e)|^2 = |x - D(m)|^2 + sum of s_i^2 |D e_i|^2."""
    objective = make()
    codec, image = objective.codec, batch[0][:1]
    keys = torch.arange(2000).split(50)
    estimates = [call(objective, (image.expand(50, -1, -1, -1), part)) for part in keys]
    losses = torch.stack([e.loss.detach() for e in estimates]).double()
    x, posterior = codec.likelihood.from_uint8(image), codec.encode(image)
    error = (x - codec.decode(posterior.mean)).square().sum()
    columns = codec.backbone.decoder.weight.square().sum((1, 2, 3))  # (z,) |D e_i|^2
    error = error + (posterior.std.square() * columns[:, None, None]).sum()
    nll = 0.5 * error / SIGMA**2 + x.numel() * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi))
    expected, spread = nll.item() + posterior.kl().item(), losses.std().item() / math.sqrt(len(losses))
    assert 0 < spread < 1e-3 * abs(expected)
    assert losses.mean().item() == pytest.approx(expected, abs=5 * spread)


def test_noise_follows_the_key_not_the_place_in_the_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective, order = make(), torch.tensor([2, 0, 1])
    torch.manual_seed(0)
    one = call(objective, batch)
    torch.manual_seed(1)
    other = call(objective, (batch[0][order], batch[1][order]))
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-6)
    assert call(objective, (batch[0], batch[1] + 1)).nll.item() != one.nll.item()


def test_free_bits_charge_each_channel_of_each_image_at_least_their_price(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    per_channel = kl_map(make().codec, batch[0]).mean((2, 3))  # (b, z) nats per element
    price = per_channel.median().item()
    objective = make(free_bits=price)
    free, plain = call(objective, batch), call(make(), batch)
    charged = torch.maximum(per_channel, torch.tensor(price)).sum(1) * (SIDE // PATCH) ** 2
    assert free.loss.item() - free.nll.item() == pytest.approx(charged.mean().item(), rel=1e-3)
    assert free.kl.item() == plain.kl.item()  # what is reported is the KL itself


def test_below_its_free_bits_a_channels_kl_has_no_gradient_in_that_image(
    batch: tuple[torch.Tensor, torch.Tensor],
) -> None:
    codec = make_codec()
    mean = kl_map(codec, batch[0]).mean((2, 3)).detach()
    price = float(mean.median())
    raw = torch.zeros(B, Z, SIDE // PATCH, SIDE // PATCH) + mean[..., None, None]
    raw.requires_grad_()
    (gradient,) = torch.autograd.grad(make(free_bits=price)._charged(raw), raw)
    below = (mean < price)[..., None, None].expand_as(raw)
    assert below.any() and not below.all()
    assert not gradient[below].any()
    torch.testing.assert_close(gradient[~below & (mean > price)[..., None, None]].unique(), torch.tensor([1 / B]))


def test_a_collapsed_channel_is_left_alone_by_free_bits(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective = make(free_bits=1e6)  # nothing costs that much
    no_kl = gradients(objective, call(objective, batch, 0.0).loss)
    for name, gradient in gradients(objective, call(objective, batch, 5.0).loss).items():
        assert torch.equal(gradient, no_kl[name])


def test_only_the_loss_has_a_gradient(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    losses = call(make(), batch, measure=True)
    assert losses.loss.requires_grad
    assert not any(value.requires_grad for value in losses[1:])


@pytest.mark.parametrize("kind", ["gaussian", "discretized_logistic"])
def test_the_mse_is_that_of_the_expected_pixels_where_it_is_measured(
    batch: tuple[torch.Tensor, torch.Tensor], kind: str
) -> None:
    likelihood = None if kind == "gaussian" else DiscretizedLogisticConfig(components=1)
    objective = make(codec=make_codec(likelihood))
    codec, (pixels, keys) = objective.codec, batch
    posterior = codec.encode(pixels)
    z = posterior.sample(normal(keys, (Z, SIDE // PATCH, SIDE // PATCH)))
    error = (codec.decode(z).double() + 1) / 2 - pixels.double() / 255
    assert call(objective, batch, measure=True).mse.item() == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert math.isnan(call(objective, batch).mse.item())


def test_the_posteriors_moments_and_clamped_share_are_reported(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective = make()
    mean = objective.codec.encode(batch[0]).mean
    losses = call(objective, batch)
    torch.testing.assert_close(losses.latent_mean, mean.mean((0, 2, 3)))
    torch.testing.assert_close(losses.latent_square, mean.square().mean((0, 2, 3)))
    assert losses.clamped.item() == 0.0
    with torch.no_grad():
        objective.codec.backbone.encoder.bias[Z] = 100.0  # the first channel's logvar
    assert call(objective, batch).clamped.item() == pytest.approx(1 / Z)


def test_under_autocast_the_loss_stays_float32_and_near(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    objective = make()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = call(objective, batch)
    assert all(value.dtype == torch.float32 for value in coarse)
    assert coarse.loss.item() == pytest.approx(call(objective, batch).loss.item(), rel=1e-2)


def test_lpips_adds_its_weight_per_pixel_and_real_gradients_to_the_decoder(
    batch: tuple[torch.Tensor, torch.Tensor], lpips: LPIPS
) -> None:
    pixels = batch[0].repeat_interleave(2, 2).repeat_interleave(2, 3)  # 32 x 32: the network needs 17
    codec, keys = make_codec(), batch[1]
    with_lpips, without = make(lpips, codec, lpips_weight=2.0), make(codec=codec)
    one, other = call(with_lpips, (pixels, keys)), call(without, (pixels, keys))
    posterior = codec.encode(pixels)
    z = posterior.sample(normal(keys, tuple(posterior.mean.shape[1:])))
    distance = lpips(codec.decode(z), pixels.float() / 127.5 - 1).mean()
    assert one.lpips.item() == pytest.approx(distance.item(), rel=1e-5) and one.lpips.item() > 0.1
    assert other.lpips.item() == 0.0
    assert one.loss.item() - other.loss.item() == pytest.approx(2.0 * 32 * 32 * distance.item(), rel=1e-3)
    # A small step of the decoder's bias against the term's gradient lowers the term by as much as the gradient says.
    bias = codec.backbone.decoder.bias
    (gradient,) = torch.autograd.grad(one.loss - other.loss, [bias])
    assert gradient.abs().min() > 0
    step = 1e-3 / gradient.norm()
    with torch.no_grad():
        bias -= step * gradient
    lower = call(with_lpips, (pixels, keys)).lpips.item()
    assert (lower - one.lpips.item()) * 2.0 * 32 * 32 == pytest.approx(-float(step * gradient.square().sum()), rel=0.1)


def test_lpips_stays_out_of_the_codec_and_of_training(lpips: LPIPS) -> None:
    objective = make(lpips, lpips_weight=1.0)
    assert objective.codec.state_dict().keys() == make_codec().state_dict().keys()
    trained = {id(p) for p in objective.parameters() if p.requires_grad}
    assert trained == {id(p) for p in objective.codec.parameters()}


def test_lpips_averages_over_images_too(batch: tuple[torch.Tensor, torch.Tensor], lpips: LPIPS) -> None:
    pixels = batch[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    objective = make(lpips, lpips_weight=3.0)
    singles = [call(objective, (p[None], k[None])).loss for p, k in zip(pixels, batch[1], strict=True)]
    assert call(objective, (pixels, batch[1])).loss.item() == pytest.approx(
        torch.stack(singles).mean().item(), rel=1e-5
    )


def test_an_lpips_module_is_there_exactly_when_its_weight_is_positive() -> None:
    with pytest.raises(ValueError, match="lpips_weight"):
        make(None, lpips_weight=1.0)
    with pytest.raises(ValueError, match="lpips_weight"):
        ELBO(photo().objective, make_codec(), nn.Identity())  # pyright: ignore[reportArgumentType]
