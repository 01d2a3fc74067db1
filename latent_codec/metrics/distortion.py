"""Compute PSNR, SSIM and MS-SSIM between uint8 images, one value per image; `PROTOCOL` defines them in words.

Every function takes x, y: (b, 3, h, w) uint8 RGB on one device and returns (b,) float64 on the CPU.
"""

import importlib.metadata

import pytorch_msssim
import torch

_WINDOW = 11
_SCALES = 5
# The window must still fit after the halvings; the package asks for one pixel more than that.
_MS_SSIM_SIDE = (_WINDOW - 1) * 2 ** (_SCALES - 1) + 1

_PACKAGE = f"pytorch-msssim {importlib.metadata.version('pytorch-msssim')}, float32"

PROTOCOL: dict[str, str] = {
    "psnr": "PSNR in dB (the mean is of decibels), uint8 RGB, peak 255, MSE over all samples of an image",
    "ssim": (
        f"SSIM, uint8 RGB, per channel then averaged, data range 255, Gaussian window {_WINDOW}x{_WINDOW} sigma 1.5, "
        f"no padding, K = (0.01, 0.03), {_PACKAGE}"
    ),
    "ms_ssim": (
        f"MS-SSIM, uint8 RGB, per channel then averaged, data range 255, {_SCALES} scales (2x2 means, odd sides padded "
        f"with 0), Gaussian window {_WINDOW}x{_WINDOW} sigma 1.5, weights of Wang et al. 2003, negative factors "
        f"count as 0, {_PACKAGE}"
    ),
}
"""Define each metric so that a reader can reproduce a value; means over a set are over images."""


def psnr(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return 10 log10(255^2 / MSE) in dB, (b,) float64; inf where the images are equal."""
    _check(x, y)
    errors = (x.int() - y.int()).square().sum((1, 2, 3), dtype=torch.int64)  # exact, so no order of summing matters
    mse = errors.cpu().double() / x.shape[1:].numel()
    return 10 * torch.log10(255**2 / mse)


def ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the SSIM (Wang et al. 2004, eq. 13), (b,) float64, at most 1; NaN for sides below 11 pixels."""
    _check(x, y)
    if min(x.shape[2:]) < _WINDOW:
        return torch.full((len(x),), torch.nan, dtype=torch.float64)
    return pytorch_msssim.ssim(x.float(), y.float(), data_range=255, size_average=False).cpu().double()


def ms_ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the MS-SSIM (Wang et al. 2003, eq. 7), (b,) float64 in [0, 1]; NaN for sides of up to 160 pixels."""
    _check(x, y)
    if min(x.shape[2:]) < _MS_SSIM_SIDE:
        return torch.full((len(x),), torch.nan, dtype=torch.float64)
    return pytorch_msssim.ms_ssim(x.float(), y.float(), data_range=255, size_average=False).cpu().double()


def _check(x: torch.Tensor, y: torch.Tensor) -> None:
    if x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise ValueError(f"metrics compare uint8 pixels, not {x.dtype} and {y.dtype}")
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"metrics compare two (b, 3, h, w) tensors, not {tuple(x.shape)} and {tuple(y.shape)}")
