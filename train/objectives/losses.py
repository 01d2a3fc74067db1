"""Define what an objective returns: the losses of a batch."""

from typing import NamedTuple

import torch

from latent_codec.model.codec import Codec

# What a key is folded with; the posterior's noise uses the key as it is.
STEP = 1  # the quantiser's step


PIXELS = 2  # drawn pixels


CHOSEN = 3  # samples that a gradient goes through


class Losses(NamedTuple):
    """Scalars are averages over the batch, in nats per image unless said otherwise; only `loss` has a gradient."""

    loss: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    nll_mode: torch.Tensor  # of the decoded mode, weighted by its step; 0 where the term is off
    lpips: torch.Tensor  # LPIPS units; 0 where the term is off
    mse: torch.Tensor  # of the expected pixels, in units of [0, 1]; NaN unless measured
    clamped: torch.Tensor  # share of clamped logvars
    latent_mean: torch.Tensor  # (z,) average of the posterior means
    latent_square: torch.Tensor  # (z,) average of their squares
    penalty: torch.Tensor  # of a vector quantiser, commitment and codebook; 0 of others
    code_use: torch.Tensor  # (K, 1 + z) as `Codes.use` gives it; (1, 1), 1, where there is no codebook
    contest: torch.Tensor  # (5,) as `Contest` names them; zeros where there is no adversary


def signed(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """Pixels in the likelihood's range, brought to [-1, 1]."""
    low, high = codec.likelihood.data_range
    return (x - low) * (2.0 / (high - low)) - 1.0
