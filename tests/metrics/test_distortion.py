"""Test metrics against formulas written out in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from latent_codec.metrics import distortion
from tests.support.errors import rejected

SIDES = st.integers(1, 12)


def pair(height: int, width: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a smooth image and a noisy copy, whose similarities are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, (batch, 3, 1, 1))
    image = 128 + 90 * np.sin(rows / 7 + phase) * np.cos(columns / 5 - phase)
    noisy = image + rng.normal(0, 20, image.shape)
    x, y = (np.clip(np.rint(a), 0, 255).astype(np.uint8) for a in (image, noisy))
    return torch.from_numpy(x), torch.from_numpy(y)


def reference_ssim(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return mean SSIM and mean structure term of one channel (h, w) float64 (Wang et al. 2004, eqs. 13 and 14)."""
    offsets = np.arange(11) - 5
    gauss = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window = gauss / gauss.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

    def local(a: np.ndarray) -> np.ndarray:
        return (sliding_window_view(a, (11, 11)) * window).sum((2, 3))

    mx, my = local(x), local(y)
    vx, vy, cov = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    structure = (2 * cov + c2) / (vx + vy + c2)
    return float(((2 * mx * my + c1) / (mx**2 + my**2 + c1) * structure).mean()), float(structure.mean())


def reference_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Return MS-SSIM of one channel (h, w) float64 with sides divisible by 16 (Wang et al. 2003, eq. 7)."""
    value = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        full, structure = reference_ssim(x, y)
        value *= (full if scale == 4 else structure) ** weight
        x, y = (a.reshape(a.shape[0] // 2, 2, -1, 2).mean((1, 3)) if scale < 4 else a for a in (x, y))
    return value


@settings(max_examples=30)
@given(SIDES, SIDES, st.integers(0, 2**32 - 1))
def test_psnr_is_the_formula_over_all_samples(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 256, (2, 3, 3, height, width), dtype=np.uint8)
    y[:, 0, 0, 0] = x[:, 0, 0, 0] ^ 1  # never equal
    mse = ((x.astype(np.float64) - y) ** 2).mean((1, 2, 3))
    values = distortion.psnr(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_allclose(values.numpy(), 10 * np.log10(65025 / mse), rtol=1e-12)


def test_equal_images_have_infinite_psnr_and_similarity_one() -> None:
    x, _ = pair(161, 170, 0)
    assert torch.isinf(distortion.psnr(x, x)).all()
    assert torch.allclose(distortion.ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(distortion.ms_ssim(x, x), torch.ones(2, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "reference", "size"),
    [
        *((distortion.ssim, lambda a, b: reference_ssim(a, b)[0], size) for size in [(11, 11), (24, 31), (40, 12)]),
        (distortion.ms_ssim, reference_ms_ssim, (176, 192)),
    ],
)
def test_similarity_is_the_formula_of_gaussian_windows(metric, reference, size: tuple[int, int]) -> None:
    x, y = pair(*size, seed=1)
    pairs = zip(x.double().numpy(), y.double().numpy(), strict=True)
    expected = [np.mean([reference(a, b) for a, b in zip(i, j, strict=True)]) for i, j in pairs]
    np.testing.assert_allclose(metric(x, y).numpy(), expected, atol=1e-4)  # float32 on values near 255^2
    assert 0.05 < min(expected) < max(expected) < 0.99


def test_similarity_is_undefined_exactly_where_windows_do_not_fit() -> None:
    for size in ((1, 1), (1, 300), (10, 300), (300, 10), (11, 11)):
        x, y = pair(*size, seed=3)
        assert distortion.ssim(x, y).isnan().all() == (size != (11, 11)) and distortion.psnr(x, y).isfinite().all()
    for size in ((160, 400), (400, 160), (161, 161)):
        assert distortion.ms_ssim(*pair(*size, seed=4)).isnan().all() == (size != (161, 161))


METRICS = pytest.mark.parametrize("metric", [distortion.psnr, distortion.ssim, distortion.ms_ssim])


@METRICS
def test_a_value_is_one_image_s_own_and_symmetric(metric) -> None:
    x, y = pair(165, 163, seed=5, batch=3)
    together = metric(x, y)
    assert together.shape == (3,) and together.dtype == torch.float64
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6) and torch.allclose(together, metric(y, x), atol=1e-6)
    assert len(set(together.tolist())) == 3


@METRICS
def test_floats_and_unlike_shapes_are_refused(metric) -> None:
    x, y = pair(16, 16, seed=6)
    for a, b, what in ((x.float(), y.float(), "uint8"), (x, y[:1], "tensors"), (x[:, :1], y[:, :1], "tensors")):
        rejected(what, metric, a, b)
