"""Define what the objectives share: how losses are combined, and the measures of a variational bound."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from latent_codec.model.codebooks import perplexity
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import Posterior
from train.objectives.adversarial import AdversarialLosses

STEP, PIXELS, CHOSEN, PREFIX = 1, 2, 3, 4
"""Numbers that a sample's key is folded with to draw the quantiser step, the binary pixels, the samples that a gradient
passes through, and the prefix of the channels. The posterior's noise uses the key as it is."""


def map_losses(function: Callable[..., torch.Tensor], *losses: Any) -> Any:
    """Apply a function to the tensors at the same place of named tuples of one kind; None stays None."""
    first = losses[0]
    if first is None or isinstance(first, torch.Tensor):
        return None if first is None else function(*losses)
    return type(first)(*(map_losses(function, *parts) for parts in zip(*losses, strict=True)))


class Bound(NamedTuple):
    """Hold the measures of the variational bound that every objective of a VAE logs, without gradients.
    Scalars are averages over the batch, in nats per image unless a comment says otherwise."""

    nll: torch.Tensor
    kl: torch.Tensor
    mse: torch.Tensor  # of the expected pixels in units of [0, 1]; NaN unless measured
    clamped: torch.Tensor  # share of the log-variances that were clamped
    latent_mean: torch.Tensor  # (z,) average of the posterior means
    latent_square: torch.Tensor  # (z,) average of their squares

    def values(self, beta: float, crop: int) -> dict[str, float]:
        """Return the logged values; `beta` is the weight of the KL and `crop` the side of an image in pixels."""
        return {
            "nll": self.nll.item(),
            "kl": self.kl.item(),
            "beta": beta,
            "kl_bpp": self.kl.item() / math.log(2) / crop**2,
            "psnr": -10 * math.log10(max(self.mse.item(), 1e-12)),
            "active_channels": active_channels(self.latent_mean, self.latent_square),
            "clamped": self.clamped.item(),
        }


class CodeLosses(NamedTuple):
    """Hold what a bottleneck with a codebook adds to the losses, without gradients."""

    penalty: torch.Tensor  # commitment and codebook loss; 0 where the codes are not trained
    use: torch.Tensor  # (K, 1 + z) as `Codes.use` returns it

    def values(self) -> dict[str, float]:
        """Return the logged values."""
        return {"perplexity": perplexity(self.use[:, 0]), "penalty": self.penalty.item()}


class VAELosses(NamedTuple):
    """Hold the losses of a batch; only `loss` has a gradient, and terms that are off are None."""

    loss: torch.Tensor
    bound: Bound  # of the ELBO, at the posterior noise that is drawn
    nll_mode: torch.Tensor | None = None  # NLL of the decoded mode, weighted by its step, in nats per image
    codes: CodeLosses | None = None
    lpips: torch.Tensor | None = None
    adversarial: AdversarialLosses | None = None

    def values(self, beta: float, crop: int) -> dict[str, float]:
        """Return the logged values; the arguments are those of `Bound.values`."""
        values = {"loss": self.loss.item()} | self.bound.values(beta, crop)
        for name, term in list(self._asdict().items())[2:]:
            if term is not None:
                values |= {name: term.item()} if isinstance(term, torch.Tensor) else term.values()
        return values


@torch.no_grad()
def bound_of(posterior: Posterior, nll: torch.Tensor, kl: torch.Tensor, mse: torch.Tensor | None) -> Bound:
    """Return the measures of a batch from its posterior, its NLL and KL (each a scalar) and, if measured, its MSE."""
    mean = posterior.mean.detach()
    return Bound(
        nll=nll.detach(),
        kl=kl.detach(),
        mse=torch.full((), math.nan, device=mean.device) if mse is None else mse,
        clamped=posterior.clamped,
        latent_mean=mean.mean((0, 2, 3)),
        latent_square=mean.square().mean((0, 2, 3)),
    )


@torch.no_grad()
def mse_of(codec: Codec, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of the expected pixels against x, both taken as lying in [0, 1]."""
    return (signed(codec, codec.likelihood.mean(params)) - signed(codec, x)).square().mean() / 4


def signed(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """Scale pixels from the likelihood's range to [-1, 1]."""
    low, high = codec.likelihood.data_range
    return (x - low) * (2.0 / (high - low)) - 1.0


def active_channels(mean: torch.Tensor, square: torch.Tensor) -> int:
    """Count the channels whose posterior mean has a variance above 0.01 (Burda et al. 2016, section 5.2), from the
    averages (z,) over the data of the means and of their squares."""
    return int((square - mean.square() > 0.01).sum())
