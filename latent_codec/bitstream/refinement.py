"""Refine an image's latents before they are coded, by gradient descent on the cost of its file: `encode --refine`.

The cost is the joint training objective with rounding in place of noise, in nats: NLL / step^2 + code length. Each
round rounds the latents, decodes them, and moves the unrounded latents against the gradient of the cost as if rounding
were the identity (the straight-through estimator: Bengio, Leonard & Courville 2013). Campos et al. (2019) and Yang,
Bamler & Mandt (2020) optimise the latents of one image in this way without rounding in the loop. Only encoders do it.
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
"""The recommended number of rounds: more gain little, and lose again at coarse steps."""

LEARNING_RATE = 1 / 600
"""Distance that a latent moves, in squared steps per nat.

A uniform quantiser's cost curves by 12 nats per squared step, so this is a fiftieth of Newton's step. Twice as much
gains sooner and loses again within five rounds."""


class Refiner:
    """Scale latents for coding as `StreamCodec.scale` does, then refine them in a number of rounds, perhaps 0."""

    def __init__(
        self, coder: StreamCodec, runner: Runner, rounds: int, *, learning_rate: float = LEARNING_RATE
    ) -> None:
        """Raise `UserError` if the rounds are negative, or if the model codes indices, which cannot be moved."""
        if rounds < 0:
            raise UserError(f"--refine {rounds} must not be negative; {USUAL_ROUNDS} is usual")
        if rounds and coder.codec.config.codes is not None:
            raise UserError("--refine moves latents before they are rounded; this model's are indices: leave it out")
        self.coder, self.runner, self.rounds, self.learning_rate = coder, runner, rounds, learning_rate

    def scale(self, coded: torch.Tensor, pixels: torch.Tensor, step: int, *, seed: int | None) -> Scaled:
        """Return an image's latents in steps, from the round with the least cost, the unrefined ones included.

        pixels: (3, height, width) uint8, not padded. Raises as `StreamCodec.scale`; `ValueError` for rounds of a draw.
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
                moved = found.latents - self.learning_rate * slope
                found = found._replace(latents=np.clip(moved, -LIMIT, LIMIT))
        return best

    def _cost(self, scaled: Scaled, pixels: torch.Tensor) -> tuple[float, np.ndarray]:
        """Return the cost in nats and its gradient (z, h, w) float64 with respect to latents in steps."""
        coding = self.coder.code(scaled)
        weight = (STEP_ONE / scaled.step) ** 2
        nll, gradient = self.runner.nll_gradient(self.coder.dequantize(coding.quantized), pixels)
        size = self.coder.channel_steps.astype(np.float64) * (scaled.step / STEP_ONE)
        slope = weight * gradient.double().numpy() * size[:, None, None]
        bits, lower, higher = neighbour_bits(self.coder.prior, coding)
        cost = weight * nll + math.log(2) * float(bits.sum())
        return cost, cost_slope(slope, math.log(2) * (lower - bits), math.log(2) * (higher - bits))


def cost_slope(slope: np.ndarray, lower: np.ndarray, higher: np.ndarray) -> np.ndarray:
    """Return the slope of the cost from that of the NLL term and the rate of neighbouring integers, all in nats.

    lower, higher: how much more the integers below and above cost. Where both cost more, the rate has a kink: the NLL
    counts only by what it exceeds the rate's slope on the side that it pulls to.
    """
    kink = (lower > 0) & (higher > 0)
    pulled = np.where(slope < 0, np.minimum(slope + higher, 0), np.maximum(slope - lower, 0))
    return np.where(kink, pulled, slope + (higher - lower) / 2)
