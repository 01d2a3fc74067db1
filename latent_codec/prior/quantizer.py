"""Turn real-valued latents into integers and back: the lossy step of the bitstream.

A channel's quantiser step is the stored step of the image times its *channel step*, which is sqrt(12) times the
standard deviation of the channel's posterior over a calibration set. At step 1 an error that is uniform over one
quantiser step thus has the posterior's variance.

Posterior means are rounded by default: to whole steps from 0 or, under a centred context prior, to whole steps from
the prior's prediction (Minnen, Balle & Toderici 2018). A seed selects subtractive dither instead (universal
quantisation: Ziv 1985; Agustsson & Theis 2020), whose error is uniform and independent of the image: the file then
holds a random draw around the mean.

Everything that a decoder computes here is exact or rounded once by IEEE 754, so all machines get the same numbers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from latent_codec.errors import UserError
from latent_codec.noise import fold, hashes

DEAD_ZONE = 0.08
"""Share of a step by which magnitudes are reduced before they are rounded to nearest. The bits saved are worth more
than the added error. Only encoders use it."""

STEP_OF_STD = math.sqrt(12)
"""Width of the uniform distribution with standard deviation 1."""

BITS_OF_ERROR = 12 / (2 * math.log(2))
"""Bits that a squared error of one step is worth: a uniform quantiser has dD / dR = -2 ln(2) D, and D = 1 / 12."""

STEP_ONE = 1024
"""Steps are stored as whole multiples of 1 / 1024."""

MIN_STEP, MAX_STEP = 1 / 64, 65535 / STEP_ONE

LIMIT = 2**14 - 1
"""Largest magnitude of a quantised latent, in steps."""

FINE = 2**17
"""Fine values count 1 / 2^17 of a step, the resolution of dither and of a centred prior's predictions."""


def round_with_dead_zone(x: torch.Tensor) -> torch.Tensor:
    """Round to integers, in x's dtype, after `DEAD_ZONE` is taken off each magnitude."""
    return x.sign() * (x.abs() + (0.5 - DEAD_ZONE)).floor()


def step_code(step: float) -> int:
    """Return the stored form of a step, a multiple of 1 / 1024; raise `UserError` outside `MIN_STEP` to `MAX_STEP`."""
    if not MIN_STEP <= step <= MAX_STEP:
        raise UserError(f"step {step:g} is outside {MIN_STEP:g} to {MAX_STEP:.3f}; smaller keeps more, 1 is usual")
    return round(step * STEP_ONE)


def octave_eighths(code: int) -> int:
    """Return round(8 log2(step)) of a stored step, in exact integers: the largest e with step^16 >= 2^(2e - 1)."""
    return ((code**16).bit_length() - 160) // 2


def dither(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return uniform dither as fine values, int64 of `shape`: odd numbers within +-2^16, from a 64-bit seed."""
    bits = hashes(fold(seed)[None], math.prod(shape))[0].numpy()  # (z * h * w,) int64
    return (2 * ((bits >> 48) & 0xFFFF) + 1 - 2**16).reshape(shape)


def channel_steps_from_std(std: np.ndarray, posterior_std: np.ndarray | None) -> np.ndarray:
    """Return the channel steps (z,) float32 for standard deviations (z,) of the latents and of their posteriors.

    A step is at least sqrt(12) / 1024 of `std`, for models that hardly add noise. Without a posterior nothing says how
    exact latents must be: all channels share one step, whose error is 1/16 of the root mean square of `std`.
    """
    if posterior_std is None:
        posterior_std = np.full_like(std, np.sqrt(np.mean(std**2)) / 16)
    return (STEP_OF_STD * np.maximum(posterior_std, std / 1024)).astype(np.float32)


class QuantizerSettings(NamedTuple):
    """Hold all that a decoder knows of an image's latents before it reads the payload."""

    shape: tuple[int, int, int]  # (z, h, w)
    step: int  # as stored
    seed: int | None  # of the dither; None: rounded

    def dither(self) -> np.ndarray:
        """Return the dither as fine values (z, h, w) int64, 0 for a rounded image."""
        return np.zeros(self.shape, np.int64) if self.seed is None else dither(self.seed, self.shape)


class BatchSettings(NamedTuple):
    """Hold the quantiser settings of images of one shape as arrays."""

    steps: np.ndarray  # (b,) int64, as stored
    octaves: np.ndarray  # (b,) int64, `octave_eighths` of the steps
    dithered: np.ndarray  # (b,) bool
    dithers: np.ndarray  # (b, z, h, w) int64, fine; 0 for rounded images


def stack(settings: Sequence[QuantizerSettings]) -> BatchSettings:
    """Return the settings of a batch of images, which must share one shape."""
    return BatchSettings(
        np.array([s.step for s in settings], np.int64),
        np.array([octave_eighths(s.step) for s in settings], np.int64),
        np.array([s.seed is not None for s in settings]),
        np.stack([s.dither() for s in settings]),
    )


class Scaled(NamedTuple):
    """Hold one image's latents in quantiser steps, not yet integers."""

    latents: np.ndarray  # (z, h, w) float64, magnitudes up to LIMIT
    step: int  # as stored
    seed: int | None  # of the dither; None: rounded

    @property
    def settings(self) -> QuantizerSettings:
        """Return what a decoder will know before the payload."""
        z, h, w = self.latents.shape
        return QuantizerSettings((z, h, w), self.step, self.seed)


class Quantized(NamedTuple):
    """Hold one image's latents as a bitstream has them."""

    fine: np.ndarray  # (z, h, w) int64, in 1 / FINE of a step
    step: int
    seed: int | None

    @property
    def values(self) -> np.ndarray:
        """Return the nearest whole steps, (z, h, w) int32; the coded values unless a prior is centred."""
        return ((self.fine + FINE // 2) >> 17).astype(np.int32)

    def scaled(self) -> Scaled:
        """Return latents that quantise to exactly these values."""
        return Scaled(self.fine / FINE, self.step, self.seed)


def scale(mean: torch.Tensor, channel_steps: np.ndarray, step: int, seed: int | None) -> Scaled:
    """Divide posterior means (z, h, w) by a stored step and the channel steps (z,) float32.
    Raises `UserError` if a value is not finite or exceeds `LIMIT` steps."""
    size = torch.from_numpy(channel_steps.astype(np.float64) * (step / STEP_ONE))[:, None, None]
    scaled = mean.detach().cpu().double() / size  # (z, h, w)
    worst = scaled.abs().amax().item() if scaled.numel() else 0.0
    if not worst <= LIMIT:  # also true of NaN
        raise UserError(
            f"a latent is {worst:g} steps large at step {step / STEP_ONE:g}, more than a bitstream's {LIMIT}; "
            "give a larger --step"
        )
    return Scaled(scaled.numpy(), step, seed)


def to_integers(latents: np.ndarray, offset: np.ndarray, dithered: np.ndarray) -> np.ndarray:
    """Return integers, int64, for which integer * FINE + offset (fine) approximates latents given in steps.
    Dithered latents are rounded to nearest, others by `round_with_dead_zone`. The shapes broadcast."""
    rest = torch.from_numpy(latents - offset / FINE)
    return torch.where(torch.from_numpy(dithered), rest.round(), round_with_dead_zone(rest)).long().numpy()


def dequantize(quantized: Quantized, channel_steps: np.ndarray) -> torch.Tensor:
    """Return the latents (z, h, w) float32 that a decoder reads: rounded means or, with dither, draws around them."""
    size = channel_steps.astype(np.float64) * quantized.step  # exact: 24 bits by 16
    product = quantized.fine * size[:, None, None]  # the one rounding in float64
    return torch.from_numpy((product * 2.0**-27).astype(np.float32))
