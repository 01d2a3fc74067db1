"""Real-valued latents <-> integers: the lossy step of the codec.

The step of a channel is the user's step times sqrt(12) times the channel's posterior standard deviation, so that at step 1
the error of an undithered or dithered quantiser, uniform over one step, has the posterior's own variance.
"""

import math

import torch

DEAD_ZONE = 0.08
"""By how much of a step magnitudes are rounded down rather than to nearest: the bits it saves are worth more than the
error it adds (docs/bitstream.md). Encoders are free to choose: no decoder needs to know."""

STEP_OF_STD = math.sqrt(12)
"""A uniform distribution of this width has standard deviation 1."""


def round_down_zone(x: torch.Tensor) -> torch.Tensor:
    """Integers, in x's dtype: magnitudes are rounded to nearest after `DEAD_ZONE` is taken off them."""
    return x.sign() * (x.abs() + (0.5 - DEAD_ZONE)).floor()
