"""The closed-form start: moments as numpy computes them, and the optimum of the linear VAE."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_codec.errors import UserError
from latent_codec.images.sources import find_images
from latent_codec.model.config import ConvConfig, DiscretizedLogisticConfig, GaussianConfig
from tests.support.closed_form import (
    LINEAR,
    LITE,
    PATCH,
    PLAN,
    SIGMA,
    STEPS,
    D,
    Z,
    crops,
    elbo,
    make,
    smooth_images,
    started,
)
from train.data.crops import Batches
from train.init.closed_form import all_patch_moments, check_closed_form, patch_moments, start_from_closed_form

CONV = ConvConfig(
    widths=(8, 8, 8), layers_per_block=1, groups=4, mid_attention=False, quant_conv=True, post_quant_conv=True
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Batches:
    return smooth_images(tmp_path_factory.mktemp("images"))


def patches(images: Batches) -> np.ndarray:
    """(n, d) float64, cut out one by one."""
    rows = []
    for image in crops(images).numpy().astype(np.float64) / 127.5 - 1:
        for top in range(0, 16, PATCH):
            rows += [image[:, top : top + PATCH, left : left + PATCH].ravel() for left in range(0, 16, PATCH)]
    return np.array(rows)


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
