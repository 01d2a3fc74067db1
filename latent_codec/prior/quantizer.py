"""Real-valued latents <-> integers: the lossy step of the bitstream.

A channel's step is `--step` times sqrt(12) times its posterior standard deviation over a calibration set, so that at
step 1 an error that is uniform over one step has the posterior's own variance. Rounding the mean is the default: to
whole steps from 0 or, under a centred context prior, from what the prior expects (Minnen, Balle & Toderici 2018).
Subtractive dither (universal quantisation: Ziv 1985; Agustsson & Theis 2020) makes the error independent of the image
and exactly uniform: what the decoder reads is then a draw around the mean, a stochastic latent in a file.

Whatever a decoder computes here is exact or a single IEEE rounding, so every machine gets the same numbers.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from latent_codec.errors import UserError
from latent_codec.noise import fold, hashes

DEAD_ZONE = 0.08
"""Share of a step by which magnitudes are rounded down rather than to nearest: the bits it saves are worth more than
the error it adds. An encoder's choice alone: no decoder needs to know."""

STEP_OF_STD = math.sqrt(12)
"""A uniform distribution of this width has standard deviation 1."""

STEP_ONE = 1024
"""Steps are whole multiples of 1 / 1024."""

MIN_STEP, MAX_STEP = 1 / 64, 65535 / STEP_ONE

LIMIT = 2**14 - 1
"""Largest magnitude of a quantised latent."""


def round_with_dead_zone(x: torch.Tensor) -> torch.Tensor:
    """Integers, in x's dtype: magnitudes are rounded to nearest after `DEAD_ZONE` is taken off them."""
    return x.sign() * (x.abs() + (0.5 - DEAD_ZONE)).floor()


def step_code(step: float) -> int:
    """The stored form of a step, a whole number of 1 / 1024; raises `UserError` outside `MIN_STEP` to `MAX_STEP`."""
    if not MIN_STEP <= step <= MAX_STEP:
        raise UserError(f"step {step:g} is outside {MIN_STEP:g} to {MAX_STEP:.3f}; smaller keeps more, 1 is usual")
    return round(step * STEP_ONE)


def octave_eighths(code: int) -> int:
    """round(8 log2(step)) in exact integer arithmetic: the largest e with step^16 >= 2^(2e - 1)."""
    return ((code**16).bit_length() - 160) // 2


def dither(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform on the odd numbers within +-2^16, int64 of `shape`, from a 64-bit seed: in 1 / 2^17 of a step."""
    bits = hashes(fold(seed)[None], math.prod(shape))[0].numpy()  # (z * h * w,) int64
    return (2 * ((bits >> 48) & 0xFFFF) + 1 - 2**16).reshape(shape)


def channel_steps_from_std(std: np.ndarray, posterior_std: np.ndarray | None) -> np.ndarray:
    """Each channel's step at step 1, (z,) float32, from its latents' standard deviation and its posterior's.

    A model that hardly adds noise would get steps that no bitstream wants; they are at least sqrt(12) / 1024 of `std`.
    Where there is no posterior, nothing says how exact latents must be: one step for all, whose error at step 1 is 1/16
    of the root mean square of `std`.
    """
    if posterior_std is None:
        posterior_std = np.full_like(std, np.sqrt(np.mean(std**2)) / 16)
    return (STEP_OF_STD * np.maximum(posterior_std, std / 1024)).astype(np.float32)


class Scaled(NamedTuple):
    """One image's latents in quantisation steps, before they are made integers."""

    latents: np.ndarray  # (z, h, w) float64, magnitudes up to LIMIT
    step: int  # as `step_code` gives it
    seed: int | None  # of the dither; None where the mean is rounded

    def dither(self) -> np.ndarray:
        """(z, h, w) int64 in 1 / 2^17 of a step, 0 where there is none."""
        return np.zeros(self.latents.shape, np.int64) if self.seed is None else dither(self.seed, self.latents.shape)


class Quantized(NamedTuple):
    """One image's latents as a bitstream holds them."""

    fine: np.ndarray  # (z, h, w) int64, in 1 / 2^17 of a step
    step: int
    seed: int | None

    @property
    def values(self) -> np.ndarray:
        """The nearest whole steps, (z, h, w) int32: of dithered latents, or those rounded around 0, what is coded."""
        return nearest(self.fine).astype(np.int32)

    def scaled(self) -> Scaled:
        """What gives exactly these integers when it is coded again."""
        return Scaled(self.fine / 2**17, self.step, self.seed)


def nearest(fine: np.ndarray) -> np.ndarray:
    return (fine + 2**16) >> 17


def scale(mean: torch.Tensor, channel_steps: np.ndarray, step: int, seed: int | None) -> Scaled:
    """The posterior's mean (z, h, w) in steps, for a stored step; `channel_steps`: (z,) float32, at step 1.

    Raises `UserError` if a value is not finite or exceeds `LIMIT` steps.
    """
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
    """Integers, int64, such that they and `offset` (1 / 2^17 of a step) come near latents given in steps.

    Where `dithered` they are the nearest, else rounded down as `round_with_dead_zone` does. The arrays' shapes agree.
    """
    rest = torch.from_numpy(latents - offset / 2**17)
    return torch.where(torch.from_numpy(dithered), rest.round(), round_with_dead_zone(rest)).long().numpy()


def dequantize(quantized: Quantized, channel_steps: np.ndarray) -> torch.Tensor:
    """Latents (z, h, w) float32: the mean's rounded value, or with dither a draw around the mean."""
    size = channel_steps.astype(np.float64) * quantized.step  # exact: 24 bits by 16
    product = quantized.fine * size[:, None, None]  # the one rounding in float64
    return torch.from_numpy((product * 2.0**-27).astype(np.float32))
