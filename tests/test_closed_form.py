"""The closed-form start: moments as numpy computes them, and the optimum of the linear VAE."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.codec import Codec
from latent_codec.config import (
    CodecConfig,
    ConvConfig,
    DiagonalGaussianConfig,
    DiscretizedLogisticConfig,
    GaussianConfig,
    IdentityConfig,
    LinearConfig,
    LiteConfig,
)
from latent_codec.errors import UserError
from latent_codec.inputs import find_images
from train.closed_form import all_patch_moments, check_closed_form, patch_moments, start_from_closed_form
from train.data import Batches, MemoryImages, Plan
from train.start import start_from_model

PATCH, Z, SIGMA = 4, 6, 0.05
D = 3 * PATCH**2
PLAN = Plan(seed=0, crop=16, flip=True, batch_size=8, micro_batches=1, rank=0, world=1)
STEPS = 6
LINEAR = CodecConfig(
    image_channels=3,
    latent_channels=Z,
    backbone=LinearConfig(patch=PATCH),
    bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
    likelihood=GaussianConfig(scale="fixed", sigma=SIGMA),
)
LITE = dataclasses.replace(
    LINEAR,
    backbone=LiteConfig(
        patch=PATCH, stem=2, encoder_widths=(8, 8), encoder_depths=(1, 1), decoder_widths=(8, 8), decoder_depths=(1, 1)
    ),
)
CONV = ConvConfig(
    widths=(8, 8, 8), layers_per_block=1, groups=4, mid_attention=False, quant_conv=True, post_quant_conv=True
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    """Smooth Gaussian fields of unequal brightness in R, G and B, within the range of pixels."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(6):
        field = random.normal(size=(32, 40, 3))
        for axis in (0, 1):
            field = (field + np.roll(field, 1, axis) + np.roll(field, 2, axis)) / math.sqrt(3)
        field = np.clip(field * 35 + np.array([150, 128, 90]), 0, 255)
        Image.fromarray(np.rint(field).astype(np.uint8)).save(folder / f"{i}.png")
    sources = find_images(folder)
    return MemoryImages(sources, torch.zeros(len(sources)), 3, PLAN.crop, torch.device("cpu"), quiet=True)


def make(config: CodecConfig) -> Codec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Codec(config)


def started(config: CodecConfig, images: Batches) -> Codec:
    codec = make(config)
    start_from_closed_form(codec, patch_moments(images, PLAN, codec, STEPS, quiet=True))
    return codec


def crops(images: Batches) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in images.batches(PLAN, 0, STEPS)])


def patches(images: Batches) -> np.ndarray:
    """(n, d) float64, cut out one by one."""
    rows = []
    for image in crops(images).numpy().astype(np.float64) / 127.5 - 1:
        for top in range(0, 16, PATCH):
            rows += [image[:, top : top + PATCH, left : left + PATCH].ravel() for left in range(0, 16, PATCH)]
    return np.array(rows)


def noises(z: int) -> Iterator[torch.Tensor]:
    """2z points whose mean is 0 and covariance 1: they integrate a quadratic over the noise exactly."""
    for axis in torch.eye(z) * math.sqrt(z):
        yield from (axis, -axis)


@torch.no_grad()
def elbo(codec: Codec, images: Batches) -> float:
    """Nats per patch, exact over the noise where the decoder is linear and patches do not overlap."""
    x = codec.likelihood.from_uint8(crops(images))
    posterior = codec.encode(x)
    log_probs = [
        codec.likelihood.log_prob(
            codec.likelihood_params(posterior.sample(e[:, None, None].expand_as(posterior.mean))), x
        ).double()
        for e in noises(codec.config.latent_channels)
    ]
    total = torch.stack(log_probs).mean(0) - posterior.kl().double()
    return float(total.mean()) / (16 // PATCH) ** 2


def test_patch_moments_are_those_of_numpy(images: Batches) -> None:
    found = patch_moments(images, PLAN, make(LINEAR), STEPS, quiet=True)
    rows = patches(images)
    mean = rows.reshape(-1, 3, PATCH**2).mean((0, 2))
    centred = rows - mean.repeat(PATCH**2)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.covariance.numpy(), centred.T @ centred / len(rows), rtol=0, atol=1e-7)


def test_moments_of_everything_are_those_of_all_whole_patches_of_all_readable_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Law 7, over images of any size that are read one by one: the linear pair is the SVD's projection."""
    random, rows = np.random.default_rng(1), []
    basis = random.normal(size=(Z, D))
    for i, (height, width) in enumerate([(9, 17), (4, 4), (3, 40), (12, 8), (21, 5)]):
        h, w = height // PATCH, width // PATCH
        found = np.clip(128 + 8 * random.normal(size=(h, w, Z)) @ basis, 0, 255).reshape(h, w, 3, PATCH, PATCH)
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        image[: h * PATCH, : w * PATCH] = found.transpose(0, 3, 1, 4, 2).reshape(h * PATCH, w * PATCH, 3)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        whole = image[: h * PATCH, : w * PATCH].reshape(h, PATCH, w, PATCH, 3).transpose(0, 2, 4, 1, 3)
        rows.append(whole.reshape(-1, D) / 127.5 - 1)
    (tmp_path / "broken.png").write_bytes(b"no image")
    codec, all_rows = (
        make(dataclasses.replace(LINEAR, likelihood=GaussianConfig(scale="fixed", sigma=1e-4))),
        np.concatenate(rows),
    )
    moments = all_patch_moments(find_images(tmp_path), codec, quiet=True)
    mean = all_rows.reshape(-1, 3, PATCH**2).mean((0, 2)).repeat(PATCH**2)
    centred = all_rows - mean
    np.testing.assert_allclose(moments.covariance.numpy(), centred.T @ centred / len(centred), rtol=0, atol=1e-7)
    assert "skipping broken.png" in caplog.text
    start_from_closed_form(codec, moments)
    _, _, vh = np.linalg.svd(centred, full_matrices=False)
    x = torch.from_numpy(rows[0]).float().reshape(-1, 3, PATCH, PATCH)
    decoded = codec.decode(codec.encode(x).mode()).detach().reshape(-1, D).numpy()
    np.testing.assert_allclose(decoded, mean + (rows[0] - mean) @ vh[:Z].T @ vh[:Z], rtol=0, atol=1e-3)


def test_images_without_a_whole_patch_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (PATCH - 1, 50)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match="no image holds a whole patch"):
        all_patch_moments(find_images(tmp_path), make(LINEAR), quiet=True)


def test_a_linear_codec_starts_at_the_optimum_of_probabilistic_pca(images: Batches) -> None:
    """Tipping & Bishop (1999), eq. 8: the likelihood of the data at the optimum, in eigenvalues alone."""
    rows = patches(images)
    centred = rows - rows.reshape(-1, 3, PATCH**2).mean((0, 2)).repeat(PATCH**2)
    values = np.linalg.eigvalsh(centred.T @ centred / len(rows))[::-1]
    assert values[Z - 1] > 1.05 * SIGMA**2  # every component is stronger than the noise
    kept, rest = np.log(values[:Z]).sum() + Z, (D - Z) * math.log(SIGMA**2) + values[Z:].sum() / SIGMA**2
    optimum = -0.5 * (D * math.log(2 * math.pi) + kept + rest)
    assert elbo(started(LINEAR, images), images) == pytest.approx(optimum, rel=1e-4)


def test_any_step_away_from_the_closed_form_is_worse(images: Batches) -> None:
    codec = started(LINEAR, images)
    best = elbo(codec, images)
    generator = torch.Generator().manual_seed(0)
    for parameter in codec.parameters():
        for size in (0.05, -0.05):
            moved = make(LINEAR)
            moved.load_state_dict(codec.state_dict())
            name = next(n for n, p in codec.named_parameters() if p is parameter)
            direction = torch.randn(parameter.shape, generator=generator) * parameter.square().mean().sqrt()
            with torch.no_grad():
                dict(moved.named_parameters())[name].add_(size * direction)
            assert elbo(moved, images) < best, name


def test_lite_starts_near_the_same_optimum_and_far_above_a_random_start(images: Batches) -> None:
    best, lite, chance = (elbo(c, images) for c in (started(LINEAR, images), started(LITE, images), make(LITE)))
    assert lite == pytest.approx(best, abs=0.02 * (best - chance))


@pytest.mark.parametrize("scale", ["learned", "per_pixel"])
def test_other_scales_start_with_the_configured_sigma(images: Batches, scale: str) -> None:
    likelihood = GaussianConfig(scale=scale, sigma=SIGMA)  # pyright: ignore[reportArgumentType]
    codec = started(dataclasses.replace(LINEAR, likelihood=likelihood), images)
    assert elbo(codec, images) == pytest.approx(elbo(started(LINEAR, images), images), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": CONV}, "closed_form needs a backbone with a linear path, not conv: set --no-closed-form"),
        (
            {"likelihood": DiscretizedLogisticConfig(components=1)},
            "closed_form needs a gaussian likelihood, not discretized_logistic: set --no-closed-form",
        ),
    ],
)
def test_where_there_is_no_closed_form_it_is_refused(images: Batches, change: dict, message: str) -> None:
    codec = make(dataclasses.replace(LINEAR, **change))
    moments = patch_moments(images, PLAN, make(LINEAR), 1, quiet=True)
    for refuse in (lambda: check_closed_form(codec), lambda: start_from_closed_form(codec, moments)):
        with pytest.raises(UserError, match=message):
            refuse()


def of(config: CodecConfig, *, channels: int, lap: int = 0) -> CodecConfig:
    assert isinstance(config.backbone, LiteConfig)
    return dataclasses.replace(config, latent_channels=channels, backbone=dataclasses.replace(config.backbone, lap=lap))


def silent(codec: Codec) -> Codec:
    """Without what the residual networks say."""
    with torch.no_grad():
        for network in ("encoder", "decoder"):
            last = [m for m in codec.backbone.get_submodule(network).modules() if isinstance(m, torch.nn.Conv2d)][-1]
            last.weight.zero_()
    return codec


@pytest.mark.parametrize("lap", [0, 3])
def test_channels_beside_a_linear_model_are_the_components_that_it_lacks(
    images: Batches, tmp_path: Path, lap: int
) -> None:
    """Four more than six are the ten of the closed form, order and signs aside."""
    silent(started(of(LITE, channels=Z), images)).save(tmp_path / "model.safetensors")
    grown = silent(make(of(LITE, channels=Z + 4, lap=lap)))
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
    config = dataclasses.replace(of(LITE, channels=Z, lap=2), classes=classes, likelihood=scale)
    model = started(config, images)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape) * parameter.square().mean().sqrt()
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


def test_a_model_with_more_channels_or_another_posterior_is_refused(images: Batches, tmp_path: Path) -> None:
    started(of(LITE, channels=Z), images).save(tmp_path / "model.safetensors")
    plain = dataclasses.replace(of(LITE, channels=Z), bottleneck=IdentityConfig())
    make(plain).save(tmp_path / "plain.safetensors")
    for config, source in (
        (of(LITE, channels=Z - 1), "model"),
        (of(plain, channels=Z + 1), "plain"),
        (of(plain, channels=Z), "model"),
    ):
        with pytest.raises(UserError, match="--start-from"):
            start_from_model(make(config), str(tmp_path / f"{source}.safetensors"), images.batches(PLAN, 0, STEPS))
