"""Compute the loss of a latent diffusion model by flow matching."""

from typing import NamedTuple

import torch
from torch import nn

from latent_codec.diffusion.model import Diffusion
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, uniform
from train.config.diffusion import FlowConfig

_POSTERIOR, _NOISE, _TIME, _DROP = range(4)  # numbers that a sample's key is folded with


class FlowLosses(NamedTuple):
    """Hold the losses of a batch; each is a scalar, and only `loss` has a gradient."""

    loss: torch.Tensor  # squared error of the velocity per latent element
    late: torch.Tensor  # the same for images with t < 1/2, where little noise is left; NaN if there are none
    early: torch.Tensor  # the same for images with t >= 1/2

    def values(self) -> dict[str, float]:
        """Return the logged values."""
        return {name: value.item() for name, value in self._asdict().items()}


class FlowMatching(nn.Module):
    """Match conditional flows on straight paths (Lipman et al. 2023; Liu et al. 2023), at logit-normal t (Esser et al.
    2024, section 3.1). A share of the labels is dropped for classifier-free guidance (Ho & Salimans 2022)."""

    def __init__(self, config: FlowConfig, model: Diffusion) -> None:
        super().__init__()
        self.config, self.model = config, model

    def forward(self, mean: torch.Tensor, logvar: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> FlowLosses:
        """Return the losses of raw posteriors (b, z, s, s) of any floating-point type.
        `labels` (b,) int64 are -1 for none; `keys` (b,) int64 determine all noise."""
        shape = tuple(mean.shape[1:])
        posterior = DiagonalGaussian(mean.float(), logvar.float())
        z = self.model.normalize(posterior.sample(normal(fold(keys, _POSTERIOR), shape)))
        noise = normal(fold(keys, _NOISE), shape)
        t = torch.sigmoid(self.config.time_mean + self.config.time_std * normal(fold(keys, _TIME), ()))  # (b,)
        labels = torch.where(uniform(fold(keys, _DROP)) < self.config.label_dropout, -1, labels)
        share = t[:, None, None, None]
        velocity = self.model((1 - share) * z + share * noise, t, labels)
        error = (velocity - (noise - z)).square().mean((1, 2, 3))  # (b,)
        late = t.detach() < 0.5
        found = error.detach()  # summed by masks: to index by them, the host would wait for the device
        parts = ((found * mask).sum() / mask.sum() for mask in (late, ~late))
        return FlowLosses(error.mean(), *parts)
