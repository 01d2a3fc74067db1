"""Compute the loss of a context prior on stored latents."""

from typing import NamedTuple

import torch
from torch import nn

from train.config.prior import PriorConfig
from train.context_prior.network import ContextNet


class PriorLosses(NamedTuple):
    """Hold the loss of a batch."""

    loss: torch.Tensor  # bits per latent position, averaged over images

    def values(self) -> dict[str, float]:
        """Return the logged values."""
        return {"bits_per_position": self.loss.item()}


class PriorObjective(nn.Module):
    """Quantise latents at random steps, and charge the bits that they cost under the prior."""

    def __init__(self, config: PriorConfig, prior: ContextNet) -> None:
        super().__init__()
        self.config, self.prior = config, prior

    def forward(self, means: torch.Tensor, keys: torch.Tensor) -> PriorLosses:
        """Return the losses of means (b, z, h, w), whose quantisation is decided by keys (b,) int64."""
        drawn = self.prior.draw(means, keys, self.config.step_range, self.config.dithered)
        return PriorLosses(self.prior.code(drawn).bits.mean())
