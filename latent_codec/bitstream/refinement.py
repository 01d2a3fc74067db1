"""Refining: an encoder that looks at what the decoder makes of the rounded latents, and moves them.

A file's cost is that of the joint phase's objective with the rounding in the noise's place, in nats: NLL / s^2 + the
code length, at step s. Each round rounds the latents, decodes them, and moves what is to be rounded against the cost's
gradient as if rounding were the identity (Bengio, Leonard & Courville 2013). Latents of one image are optimised in this
way by Campos et al. (2019) and Yang, Bamler & Mandt (2020), without rounding in the loop. No decoder needs to know.
"""

import math

import numpy as np
import torch

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.inference.runner import Runner
from latent_codec.prior.passes import neighbour_bits
from latent_codec.prior.quantizer import LIMIT, STEP_ONE, Scaled

USUAL_ROUNDS = 3
"""What is measured and recommended: more gain little, or lose again where the step is coarse."""

_RATE = 1 / 600
"""Squared steps that latents move for a nat per step. A uniform quantiser's own error has a curvature of 12 nats per
squared step at the slope that NLL / s^2 asks for: this is a fiftieth of Newton's step. Twice as much gains sooner and
loses again within five rounds."""


class Refiner:
    """Latents to be coded, refined in so many rounds; 0 leaves them as they are."""

    def __init__(self, coder: StreamCodec, runner: Runner, rounds: int) -> None:
        """Raises `UserError` if the rounds are negative, or the model has nothing that could be moved."""
        if rounds < 0:
            raise UserError(f"--refine {rounds} must not be negative; {USUAL_ROUNDS} is usual")
        if rounds and coder.codec.config.codes is not None:
            raise UserError("--refine moves latents before they are rounded; this model's are indices: leave it out")
        self.coder, self.runner, self.rounds = coder, runner, rounds

    def scale(self, coded: torch.Tensor, pixels: torch.Tensor, step: int, *, seed: int | None) -> Scaled:
        """As `StreamCodec.scale`, refined for the image's pixels (3, height, width) uint8, which are not padded.

        The best of all rounds, and of none, by the cost. Raises as `StreamCodec.scale` does, and `ValueError` for a
        dither's seed where there are rounds: what is drawn around is the posterior's mean.
        """
        found = self.coder.scale(coded, step, seed)
        if self.rounds and seed is not None:
            raise ValueError("a draw around refined latents is no draw from the posterior")
        best, least = found, math.inf
        for left in reversed(range(self.rounds + 1)) if self.rounds else ():
            cost, slope = self._cost(found, pixels)
            if cost < least:
                best, least = found, cost
            if not np.isfinite(slope).all():  # float16 has its limits
                break
            if left:
                found = found._replace(latents=np.clip(found.latents - _RATE * slope, -LIMIT, LIMIT))
        return best

    def _cost(self, scaled: Scaled, pixels: torch.Tensor) -> tuple[float, np.ndarray]:
        """In nats, and its gradient with respect to latents in steps, (z, h, w) float64."""
        coding = self.coder.code(scaled)
        weight = (STEP_ONE / scaled.step) ** 2
        nll, gradient = self.runner.nll_gradient(self.coder.dequantize(coding.quantized), pixels)
        size = self.coder.channel_steps.astype(np.float64) * (scaled.step / STEP_ONE)
        slope = weight * gradient.double().numpy() * size[:, None, None]
        bits, lower, higher = neighbour_bits(self.coder.prior, coding)
        return weight * nll + math.log(2) * float(bits.sum()), _with_rate(
            slope, *(math.log(2) * (other - bits) for other in (lower, higher))
        )


def _with_rate(slope: np.ndarray, lower: np.ndarray, higher: np.ndarray) -> np.ndarray:
    """The distortion's slope and the rate's, given what each integer's neighbours below and above cost more.

    Where both cost more the rate has a kink: only what exceeds its slope on the side that the distortion pulls to
    counts.
    """
    kink = (lower > 0) & (higher > 0)
    pulled = np.where(slope < 0, np.minimum(slope + higher, 0), np.maximum(slope - lower, 0))
    return np.where(kink, pulled, slope + (higher - lower) / 2)
