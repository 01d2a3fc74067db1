"""Beginning with another model's weights: what a larger model adds to it says nothing yet, or what is missing."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, GaussianConfig, IdentityConfig
from tests.support.closed_form import LITE, PLAN, SIGMA, STEPS, Z, elbo, make, smooth_images, started
from train.data.crops import Batches
from train.init.from_model import start_from_model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return smooth_images(tmp_path_factory.mktemp("images"))


def of(config: CodecConfig, *, channels: int = Z, **fields: Any) -> CodecConfig:
    """With fields of the backbone replaced."""
    return dataclasses.replace(
        config, latent_channels=channels, backbone=dataclasses.replace(config.backbone, **fields)
    )


def shaken(codec: Codec) -> Codec:
    """As if trained: no weight is where it began."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter += 0.05 * torch.randn(parameter.shape) * parameter.square().mean().sqrt()
    return codec


def silent(codec: Codec) -> Codec:
    """Without what the residual networks say."""
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
def test_what_is_new_says_nothing_until_it_is_trained(images: Batches, tmp_path: Path, fields: dict[str, Any]) -> None:
    model = shaken(started(LITE, images))
    model.save(tmp_path / "model.safetensors")
    grown = make(of(LITE, **fields))
    start_from_model(grown, str(tmp_path / "model.safetensors"), iter(()))
    x = model.likelihood.from_uint8(next(images.batches(PLAN, 0, 1)).pixels)
    found, wanted = grown.encode(x), model.encode(x)
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grown.decode(found.mean), model.decode(wanted.mean), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(grown.parameters(), lr=1e-3)
    for _ in range(2):  # the first step moves what stands between the new weights and the result
        optimizer.zero_grad()
        (grown.decode(grown.encode(x).mean) - x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in grown.parameters())


@pytest.mark.parametrize("overlap", [0, 3])
def test_channels_beside_a_linear_model_are_the_components_that_it_lacks(
    images: Batches, tmp_path: Path, overlap: int
) -> None:
    """Four more than six are the ten of the closed form, order and signs aside."""
    silent(started(of(LITE, channels=Z), images)).save(tmp_path / "model.safetensors")
    grown = silent(make(of(LITE, channels=Z + 4, overlap=overlap)))
    start_from_model(grown, str(tmp_path / "model.safetensors"), images.batches(PLAN, 0, STEPS))
    at_once, before = (silent(started(of(LITE, channels=z), images)) for z in (Z + 4, Z))
    assert elbo(grown, images) == pytest.approx(elbo(at_once, images), rel=1e-5)
    assert elbo(grown, images) > elbo(before, images) + 1


@pytest.mark.parametrize("classes", [(), ("one", "two")])
def test_channels_beside_a_trained_model_leave_its_own_as_they_were(
    images: Batches, tmp_path: Path, classes: tuple[str, ...]
) -> None:
    """And gain, whatever the networks have come to say; a per-pixel sigma and classes keep their rows."""
    scale = GaussianConfig(scale="per_pixel", sigma=SIGMA)
    config = dataclasses.replace(of(LITE, channels=Z, overlap=2), classes=classes, likelihood=scale)
    model = shaken(started(config, images))
    model.save(tmp_path / "model.safetensors")
    grown = make(dataclasses.replace(config, latent_channels=Z + 4))
    start_from_model(grown, str(tmp_path / "model.safetensors"), images.batches(PLAN, 0, STEPS))
    batch = next(images.batches(PLAN, STEPS, STEPS + 1))
    labels = torch.arange(len(batch.pixels)) % 2
    with torch.no_grad():
        own, posterior = model.encode(batch.pixels, labels), grown.encode(batch.pixels, labels)
        torch.testing.assert_close(posterior.mean[:, :Z], own.mean)
        torch.testing.assert_close(posterior.std[:, :Z], own.std)  # pyright: ignore[reportAttributeAccessIssue]
        nothing = posterior.mean * (torch.arange(Z + 4) < Z)[:, None, None]
        torch.testing.assert_close(grown.likelihood_params(nothing, labels), model.likelihood_params(own.mean, labels))
        x = grown.likelihood.from_uint8(batch.pixels)
        before = (model.decode(own.mean, labels) - x).square().mean()
        after = (grown.decode(posterior.mean, labels) - x).square().mean()
    assert after < 0.9 * before


def test_what_does_not_fit_is_refused(images: Batches, tmp_path: Path) -> None:
    """More channels, blocks or overlap in the model, another posterior, other widths."""
    plain = dataclasses.replace(LITE, bottleneck=IdentityConfig())
    large = of(LITE, overlap=2, decoder_depths=(1, 2))
    for name, config in (("model", LITE), ("plain", plain), ("large", large)):
        make(config).save(tmp_path / f"{name}.safetensors")
    for config, source in (
        (of(LITE, channels=Z - 1), "model"),
        (of(plain, channels=Z + 1), "plain"),
        (plain, "model"),
        (of(large, overlap=0), "large"),
        (of(large, decoder_depths=(2, 1)), "large"),
        (of(LITE, encoder_widths=(8, 16)), "model"),
    ):
        with pytest.raises(UserError, match="--start-from"):
            start_from_model(make(config), str(tmp_path / f"{source}.safetensors"), images.batches(PLAN, 0, STEPS))
