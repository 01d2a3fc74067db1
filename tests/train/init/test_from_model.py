"""Test starting from another model's weights: additions have no effect yet, and new channels learn what is missing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, GaussianConfig, IdentityConfig
from tests.support.closed_form import LITE, PATCH, PLAN, SIGMA, STEPS, Z, elbo, smooth_images, started
from tests.support.errors import refused
from tests.support.networks import CLAMP, make_codec
from tests.support.prior import as_priors, context_prior
from train.data.crops import Batches, SamplePlan
from train.init.from_model import start_from_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return smooth_images(tmp_path_factory.mktemp("images"))


WHOLE = PLAN._replace(crop=32)


def lite(channels: int = Z, base: CodecConfig = LITE, **fields: Any) -> CodecConfig:
    """Return a configuration with fields of the backbone replaced."""
    return dataclasses.replace(base, latent_channels=channels, backbone=dataclasses.replace(base.backbone, **fields))


def grow(
    model: Codec, config: CodecConfig, images: Batches, tmp_path: Path, plan: SamplePlan = WHOLE, steps: int = 4 * STEPS
) -> Codec:
    """Save a model, and start one of another configuration from it."""
    model.save(tmp_path / "model.safetensors")
    grown = make_codec(config)
    start_from_model(grown, str(tmp_path / "model.safetensors"), images.batches(plan, 0, steps))
    return grown


def shaken(codec: Codec) -> Codec:
    """Change all weights, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter += 0.05 * torch.randn(parameter.shape) * parameter.square().mean().sqrt()
    return codec


def linear(codec: Codec) -> Codec:
    """Set the last layers of the residual networks to zero."""
    with torch.no_grad():
        for network in ("encoder", "decoder"):
            last = [m for m in codec.backbone.get_submodule(network).modules() if isinstance(m, torch.nn.Conv2d)][-1]
            last.weight.zero_()
    return codec


@pytest.mark.parametrize(
    "fields",
    [
        {"overlap": 3},
        {"encoder_depths": (2, 1)},
        {"encoder_depths": (1, 3), "decoder_depths": (3, 2)},
        {"decoder_depths": (1, 2), "overlap": 2},
    ],
    ids=["overlap", "a block", "blocks both ways", "both"],
)
def test_additions_have_no_effect_until_trained(images: Batches, tmp_path: Path, fields: dict[str, Any]) -> None:
    model = shaken(started(LITE, images))
    grown = grow(model, lite(**fields), images, tmp_path)
    x = model.likelihood.from_uint8(next(images.batches(PLAN, 0, 1)).pixels)
    found, wanted = grown.encode(x), model.encode(x)
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grown.decode(found.mean), model.decode(wanted.mean), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(grown.parameters(), lr=1e-3)
    for _ in range(2):  # the first step moves what lies between the new weights and the result
        optimizer.zero_grad()
        (grown.decode(grown.encode(x).mean) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in grown.parameters())


@pytest.mark.parametrize(("overlap", "plan", "steps", "tolerance"), [(0, PLAN, STEPS, 1e-5), (3, WHOLE, 24, 0.02)])
def test_channels_added_to_linear_models_are_next_components(
    images: Batches, tmp_path: Path, overlap: int, plan: SamplePlan, steps: int, tolerance: float
) -> None:
    """Six channels and four more are the ten of the closed form, up to order and signs; windows need more crops."""
    before, at_once = (linear(started(lite(z), images)) for z in (Z, Z + 4))
    grown = linear(grow(before, lite(Z + 4, overlap=overlap), images, tmp_path, plan, steps))
    assert elbo(grown, images) == pytest.approx(elbo(at_once, images), rel=tolerance)
    assert elbo(grown, images) > elbo(before, images) + 1


@pytest.mark.parametrize("classes", [(), ("one", "two")])
def test_channels_added_later_lower_the_error(images: Batches, tmp_path: Path, classes: tuple[str, ...]) -> None:
    """The rows of a per-pixel sigma and of classes are kept too."""
    scale = GaussianConfig(scale="per_pixel", sigma=SIGMA)
    config = dataclasses.replace(lite(overlap=2), classes=classes, likelihood=scale)
    model = shaken(started(config, images))
    grown = grow(model, dataclasses.replace(config, latent_channels=Z + 4), images, tmp_path)
    batch = next(images.batches(WHOLE, 4 * STEPS, 4 * STEPS + 1))
    labels = torch.arange(len(batch.pixels)) % 2
    with torch.no_grad():
        own, posterior = model.encode(batch.pixels, labels), grown.encode(batch.pixels, labels)
        torch.testing.assert_close(posterior.mean[:, :Z], own.mean)
        torch.testing.assert_close(posterior.std[:, :Z], own.std)  # pyright: ignore[reportAttributeAccessIssue]
        old = posterior.mean * (torch.arange(Z + 4) < Z)[:, None, None]
        torch.testing.assert_close(grown.likelihood_params(old, labels), model.likelihood_params(own.mean, labels))
        x = grown.likelihood.from_uint8(batch.pixels)
        inner = (..., slice(PATCH, -PATCH), slice(PATCH, -PATCH))  # windows of the others leave the image
        before = (model.decode(own.mean, labels) - x)[inner].square().mean()
        after = (grown.decode(posterior.mean, labels) - x)[inner].square().mean()
    assert after < 0.9 * before


def test_log_variances_that_are_no_longer_predicted_take_their_average(images: Batches, tmp_path: Path) -> None:
    config = dataclasses.replace(LITE, bottleneck=dataclasses.replace(CLAMP, logvar_channels=2))
    model = shaken(started(LITE, images))
    fewer = grow(model, config, images, tmp_path)
    x = torch.cat([batch.pixels for batch in images.batches(WHOLE, 0, 16)])
    before, after = (codec.encode(x) for codec in (model, fewer))
    torch.testing.assert_close(after.mean, before.mean)
    logvar, found = (p.logvar for p in (before, after))  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(found[:, :2], logvar[:, :2])
    average = logvar[:, 2:].mean((0, 2, 3), keepdim=True).expand_as(found[:, 2:])
    torch.testing.assert_close(found[:, 2:], average, rtol=1e-4, atol=1e-4)
    at_once = started(config, images)
    expected = started(LITE, images).encode(x).logvar.mean((0, 2, 3))  # pyright: ignore[reportAttributeAccessIssue]
    assert at_once.bottleneck.logvar.tolist() == pytest.approx(expected[2:].tolist(), abs=0.05)  # pyright: ignore


PLAIN = dataclasses.replace(LITE, bottleneck=IdentityConfig())
LARGE = lite(overlap=2, decoder_depths=(1, 2))


@pytest.mark.parametrize(
    ("source", "config"),
    [
        (LITE, lite(Z - 1)),
        (PLAIN, lite(Z + 1, PLAIN)),
        (LITE, PLAIN),
        (LARGE, lite(base=LARGE, overlap=0)),
        (LARGE, lite(base=LARGE, decoder_depths=(2, 1))),
        (LITE, lite(encoder_widths=(8, 16))),
    ],
    ids=["fewer channels", "channels without posterior", "other posterior", "less overlap", "fewer blocks", "widths"],
)
def test_other_models_are_refused(images: Batches, tmp_path: Path, source: CodecConfig, config: CodecConfig) -> None:
    refused("--start-from", grow, make_codec(source), config, images, tmp_path)


def test_nested_channels_follow_the_priors_order_and_are_made_for_fine_steps(images: Batches, tmp_path: Path) -> None:
    model, groups = shaken(started(lite(overlap=2), images)), (2, Z - 2)
    model.priors = as_priors(context_prior(groups, 4, 0, centred=True))
    config = lite(Z + 4, overlap=2)
    nested, plain = (
        grow(model, dataclasses.replace(config, prefixes=prefixes), images, tmp_path)
        for prefixes in ((2, Z, Z + 4), ())
    )
    x = model.likelihood.from_uint8(next(images.batches(WHOLE, 0, 1)).pixels)
    order = model.priors.context.order.tolist()  # pyright: ignore[reportOptionalMemberAccess]
    assert order != sorted(order)
    mean = nested.encode(x).mean
    torch.testing.assert_close(mean[:, :Z], model.encode(x).mean[:, order])
    torch.testing.assert_close(nested.decode(mean[:, :Z]), model.decode(model.encode(x).mode()))
    errors = [(codec.decode(codec.encode(x).mode()) - x).square().mean() for codec in (nested, plain)]
    assert errors[0] < errors[1]
