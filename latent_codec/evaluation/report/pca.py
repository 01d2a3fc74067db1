"""Fit principal components of patches, the baseline of any model of the same latent size."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import rearrange

from latent_codec.images.geometry import pad

LARGEST = 4096
"""Largest number of values of a patch; the covariance of more is too costly for a baseline."""


class PatchPCA(NamedTuple):
    """Hold orthonormal components (d, z) of patches, flattened (channel, row, column), and their mean (d,), float64."""

    patch: int
    mean: torch.Tensor
    basis: torch.Tensor

    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return images (c, h, w) uint8 rebuilt from z numbers per patch, rounded and clipped; odd sizes are padded."""
        _, height, width = pixels.shape
        padded = pad(pixels, self.patch)
        centred = _patches(padded, self.patch) - self.mean  # (n, d)
        found = centred @ self.basis @ self.basis.T + self.mean
        sizes = {"p": self.patch, "q": self.patch, "h": padded.shape[1] // self.patch}
        image = rearrange(found, "(h w) (c p q) -> c (h p) (w q)", c=len(pixels), **sizes)
        return image.round().clamp(0, 255).to(torch.uint8)[:, :height, :width]


def fit(images: Iterable[torch.Tensor], patch: int, components: int) -> PatchPCA:
    """Fit components in closed form to the moments, exact in float64, of all patches of images (c, h, w) uint8.

    Raises `ValueError` without images, or for more components than a patch has values.
    """
    total, outer, count = torch.zeros(()), torch.zeros(()), 0
    for pixels in images:
        rows = _patches(pad(pixels, patch), patch)  # (n, d)
        total, outer, count = total + rows.sum(0), outer + rows.T @ rows, count + len(rows)
    if not count:
        raise ValueError("no images to fit principal components to")
    mean = total / count
    if components > len(mean):
        raise ValueError(f"{components} components of patches of {len(mean)} values; there are no more than those")
    _, basis = torch.linalg.eigh(outer / count - torch.outer(mean, mean))
    return PatchPCA(patch, mean, basis.flip(1)[:, :components])  # strongest first


def _patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    return rearrange(pixels.double(), "c (h p) (w q) -> (h w) (c p q)", p=patch, q=patch)
