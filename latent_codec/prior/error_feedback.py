"""Shift each latent's rounding target to compensate for the errors of neighbours that are already rounded.

Errors of neighbouring latents add up or cancel in the pixels, as a decoder is no orthogonal transform. To second order
the squared error of the pixels is e' G e for errors e of the latents, where G = J' J and J is the decoder's Jacobian.
Given the errors of earlier passes, the best error of latent i is -sum_j G_ij e_j / G_ii: its mean plus that is what the
encoder rounds. This is one step of the nearest-plane search in a lattice (Babai 1986), or quantisation with error
feedback (Spang & Schultheiss 1962) of a vector field in two dimensions. The exact solution, which also shifts latents
that are still to be rounded, gains less, because many of those round to 0.

G belongs to the decoder and is averaged over places in images. Only encoders use it.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from latent_codec.prior.layout import patches, strips
from latent_codec.prior.quantizer import FINE

REACH = 1
"""Positions to each side whose errors count."""

WEIGHT_BITS = 14
"""Weights are whole multiples of 2^-WEIGHT_BITS."""

_LARGEST_ERROR = 4 * FINE  # a larger difference is no rounding error


class Feedback(NamedTuple):
    """Hold the quotients G_ij / G_ii of neighbouring latents, and compute shifts from them.
    Sums are of integers below 2^53, so float64 holds them exactly, whatever the order of addition."""

    weights: np.ndarray
    """(z, z, 3, 3) int16 in 2^-14: for channel i, by channel j and the row and column of its neighbour."""
    max_positions: int = 2**12
    """Positions that are computed at once, which bounds the memory."""

    @property
    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the weights."""
        return hashlib.sha256(self.weights.astype("<i2").tobytes()).hexdigest()[:16]

    def shift(self, errors: np.ndarray, seen: np.ndarray, channels: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Return how far from the means, in steps, the latents of `channels` should be rounded, (b, g, n) float64.

        errors: (b, len(seen), h, w) float64 in whole fine units, of the channels `seen`, 0 where they are not known;
        where: (h, w) bool, the n positions.
        """
        b, _, h, w = errors.shape
        weights = self.weights[channels][:, seen].astype(np.float64).reshape(len(channels), len(seen), -1)
        weight = torch.from_numpy(weights).permute(2, 1, 0).flatten(0, 1)  # (9 * seen, g)
        known = torch.from_numpy(errors).clamp(-_LARGEST_ERROR, _LARGEST_ERROR)
        known = pad(known.movedim(1, 3), (0, 0, 1, 1, 1, 1))  # (b, h + 2, w + 2, seen)
        sites = torch.from_numpy(where)
        parts = [
            patches(known[:, top : bottom + 2], sites[top:bottom]) @ weight
            for top, bottom in strips((b, h, w), self.max_positions)
        ]
        return torch.cat(parts, 1).mT.numpy() * -(2.0**-WEIGHT_BITS / FINE)  # (b, g, n)
