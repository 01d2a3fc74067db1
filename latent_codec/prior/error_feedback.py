"""Error feedback: latents that are still to be rounded make up for what rounding did to others before them.

A decoder is no orthogonal transform: errors of latents that lie near one another add up in the pixels, or cancel. To
second order the pixels' squared error is e' G e for errors e of the latents, with G = J' J of the decoder's Jacobian J.
Once some are known, a latent i leaves the least of it if its own error is -sum_j G_ij e_j / G_ii, which is what it is
rounded around in its mean's place. That is one step towards the nearest point of a lattice that is not rectangular
(Babai 1986), and quantisation with error feedback (Spang & Schultheiss 1962), of a vector and in two dimensions. The
exact solution, which lets undecoded latents have their share, gains less: many of them will be rounded to nothing.

G is a property of the decoder, averaged over places in images. No decoder of streams needs to know.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from latent_codec.prior.context import patches

REACH = 1
"""Latent positions to each side whose errors count."""

WEIGHT_BITS = 14
"""Of weights behind the point."""

_LARGEST_ERROR = 4 * 2**17  # in 1 / 2^17 of a step; more is no rounding error
_STRIP = 2**12  # positions that are looked at at once: what bounds the memory


class Feedback(NamedTuple):
    """Weights (z, z, 3, 3) int16, in 1 / 2^14: what errors of channel j, so many rows and columns away, count for i.

    Sums are of integers below 2^53, so float64 holds them exactly, in whatever order a machine adds.
    """

    weights: np.ndarray

    @property
    def digest(self) -> str:
        """16 hex digits that tell one from another."""
        return hashlib.sha256(self.weights.astype("<i2").tobytes()).hexdigest()[:16]

    def shift(self, errors: np.ndarray, seen: np.ndarray, channels: np.ndarray, where: np.ndarray) -> np.ndarray:
        """How far from their means, in steps, latents of some channels are best, (b, g, n) float64.

        errors: (b, len(seen), h, w) float64, whole numbers of 1 / 2^17 of a step, of the channels `seen`, 0 where they
        are not known; where: (h, w) bool, the n positions.
        """
        b, _, h, w = errors.shape
        weights = self.weights[channels][:, seen].astype(np.float64).reshape(len(channels), len(seen), -1)
        weight = torch.from_numpy(weights).permute(2, 1, 0).flatten(0, 1)  # (9 * seen, g)
        known = torch.from_numpy(errors).clamp(-_LARGEST_ERROR, _LARGEST_ERROR)
        known = pad(known.movedim(1, 3), (0, 0, 1, 1, 1, 1))  # (b, h + 2, w + 2, seen)
        sites, rows = torch.from_numpy(where), max(1, _STRIP // (b * w))
        parts = [patches(known[:, top : top + rows + 2], sites[top : top + rows]) @ weight for top in range(0, h, rows)]
        return torch.cat(parts, 1).mT.numpy() * -(2.0 ** -(WEIGHT_BITS + 17))  # (b, g, n)


def exact_errors(fine: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """What rounding did to latents, whole numbers of 1 / 2^17 of a step as float64: `fine` less latents in steps."""
    return fine - np.rint(latents * 2**17)
