"""Test the closed-form start: patch moments equal numpy's, and the start is the optimum of the linear VAE."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from latent_codec.model.config import DiscretizedLogisticConfig, GaussianConfig
from latent_codec.model.networks.linear import PatchMoments
from tests.support.closed_form import LINEAR, LITE, PATCH, PLAN, SIGMA, STEPS, D, Z, crops, elbo, smooth_images, started
from tests.support.errors import refused
from tests.support.networks import CONV, make_codec
from train.data.crops import Batches
from train.init.closed_form import all_patch_moments, check_closed_form, patch_moments, start_from_closed_form


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return smooth_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def linear(images: Batches) -> Codec:
    return started(LINEAR, images)


def patches(images: np.ndarray) -> np.ndarray:
    """Cut uint8 images (n, c, h, w) into whole patches (m, d) float64 in -1..1."""
    n, c, h, w = images.shape
    whole = images[:, :, : h // PATCH * PATCH, : w // PATCH * PATCH]
    rows = whole.reshape(n, c, h // PATCH, PATCH, w // PATCH, PATCH).transpose(0, 2, 4, 1, 3, 5)
    return rows.reshape(-1, D) / 127.5 - 1


def centred(rows: np.ndarray) -> np.ndarray:
    """Subtract the mean of each channel."""
    return rows - rows.reshape(-1, 3, PATCH**2).mean((0, 2)).repeat(PATCH**2)


def assert_moments(found: PatchMoments, rows: np.ndarray) -> None:
    np.testing.assert_allclose(found.mean.numpy(), rows.reshape(-1, 3, PATCH**2).mean((0, 2)), rtol=0, atol=1e-7)
    expected = centred(rows).T @ centred(rows) / len(rows)
    np.testing.assert_allclose(found.covariance.numpy(), expected, rtol=0, atol=1e-7)


def test_patch_moments_are_those_of_numpy(images: Batches) -> None:
    assert_moments(patch_moments(images, PLAN, make_codec(LINEAR), STEPS, quiet=True), patches(crops(images).numpy()))


def test_moments_cover_every_whole_patch_of_readable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    random, parts = np.random.default_rng(1), []
    for i, (height, width) in enumerate([(9, 17), (4, 4), (3, 40), (12, 8), (21, 5)]):
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        parts.append(patches(image.transpose(2, 0, 1)[None]))
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert_moments(all_patch_moments(find_images(tmp_path), make_codec(LINEAR), quiet=True), np.concatenate(parts))
    assert "skipping broken.png" in caplog.text


def test_images_without_a_whole_patch_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (PATCH - 1, 50)).save(tmp_path / "thin.png")
    refused("no image holds a whole patch", all_patch_moments, find_images(tmp_path), make_codec(LINEAR), quiet=True)


def test_a_linear_codec_starts_at_the_optimum_of_probabilistic_pca(images: Batches, linear: Codec) -> None:
    """Tipping & Bishop (1999), eq. 8: the likelihood of the data at the optimum, in eigenvalues alone."""
    rows = centred(patches(crops(images).numpy()))
    values = np.linalg.eigvalsh(rows.T @ rows / len(rows))[::-1]
    assert values[Z - 1] > 1.05 * SIGMA**2  # every component is stronger than the noise
    kept, rest = np.log(values[:Z]).sum() + Z, (D - Z) * math.log(SIGMA**2) + values[Z:].sum() / SIGMA**2
    optimum = -0.5 * (D * math.log(2 * math.pi) + kept + rest)
    assert elbo(linear, images) == pytest.approx(optimum, rel=1e-4)


def test_lite_starts_near_the_same_optimum_and_far_above_a_random_start(images: Batches, linear: Codec) -> None:
    best, lite, chance = (elbo(c, images) for c in (linear, started(LITE, images), make_codec(LITE)))
    assert lite == pytest.approx(best, abs=0.02 * (best - chance))


@pytest.mark.parametrize("scale", ["learned", "per_pixel"])
def test_other_scales_start_with_the_configured_sigma(images: Batches, linear: Codec, scale: str) -> None:
    likelihood = GaussianConfig(scale=scale, sigma=SIGMA)  # pyright: ignore[reportArgumentType]
    codec = started(dataclasses.replace(LINEAR, likelihood=likelihood), images)
    assert elbo(codec, images) == pytest.approx(elbo(linear, images), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": CONV}, "a backbone with a linear path, not conv"),
        ({"likelihood": DiscretizedLogisticConfig(components=1)}, "a gaussian likelihood, not discretized_logistic"),
    ],
)
def test_models_without_a_closed_form_are_refused(images: Batches, change: dict, message: str) -> None:
    codec = make_codec(dataclasses.replace(LINEAR, **change))
    moments = patch_moments(images, PLAN, make_codec(LINEAR), 1, quiet=True)
    for refuse in (lambda: check_closed_form(codec), lambda: start_from_closed_form(codec, moments)):
        refused(f"closed_form needs {message}: set --no-closed-form", refuse)
