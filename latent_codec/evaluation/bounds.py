"""Bound the log-likelihood of images by the ELBO and by importance weighting (IWAE)."""

import math
from typing import NamedTuple

import torch

from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal
from latent_codec.precision import in_float64

_PIXELS = -1  # folded into the key to draw pixels; samples are numbered from 0


class Bounds(NamedTuple):
    """Hold lower bounds of log p(x), perhaps a density, of b images from k samples, in nats, float64 on the CPU."""

    log_likelihoods: torch.Tensor  # (b, k) log p(x given z)
    log_weights: torch.Tensor  # (b, k) log p(x given z) + log p(z) - log q(z given x)
    kl: torch.Tensor  # (b,) KL(q(z given x) || N(0, I)), in closed form

    @property
    def elbo(self) -> torch.Tensor:
        """Return the mean log-likelihood less the KL in closed form, (b,) (Kingma & Welling 2014, eq. 7)."""
        return self.log_likelihoods.mean(1) - self.kl

    @property
    def iwae(self) -> torch.Tensor:
        """Return the log of the mean weight, (b,), at least the mean of `log_weights` (Burda et al. 2016, eq. 8)."""
        return torch.logsumexp(self.log_weights, 1) - math.log(self.log_weights.shape[1])

    @property
    def effective_samples(self) -> torch.Tensor:
        """Return (sum of weights)^2 / sum of their squares, (b,) in [1, k] (Kong et al. 1994); near 1 one decides."""
        return torch.exp(2 * torch.logsumexp(self.log_weights, 1) - torch.logsumexp(2 * self.log_weights, 1))


@torch.inference_mode()
def bounds(
    codec: Codec, x: torch.Tensor, keys: torch.Tensor, k: int, *, at_once: int, labels: torch.Tensor | None = None
) -> Bounds:
    """Bound log p(x) by k draws from each image's Gaussian posterior.

    x: (b, c, h, w), as for `Codec.encode`; uint8 pixels that the likelihood draws are drawn once, by the key. keys:
    (b,) int64 on the CPU. Sample i of an image depends on its key and i alone. `at_once` samples go through the decoder
    together, which bounds the memory. Sums over pixels are float32, exact to about 1e-7 of their size. Raises
    `ValueError` if k or `at_once` is below 1 or the posterior is not Gaussian, and as `Codec.encode` does.
    """
    if k < 1 or at_once < 1:
        raise ValueError(f"{k} samples, {at_once} at once: both must be at least 1")
    x = codec.likelihood.observe(x, fold(keys, _PIXELS).to(x.device)) if x.dtype == torch.uint8 else x
    posterior = codec.encode(x, labels)
    if not isinstance(posterior, DiagonalGaussian):
        raise ValueError(f"a {codec.config.bottleneck.kind} bottleneck has no density to weigh samples by")
    b, each = len(x), max(1, at_once // len(x))
    log_likelihoods, log_ratios = [], []
    for start in range(0, k, each):
        samples = torch.arange(start, min(start + each, k))
        n = len(samples)
        noise = normal(fold(keys, samples[:, None]).flatten().to(x.device), tuple(posterior.mean.shape[1:]))
        repeated = (moment.repeat(n, 1, 1, 1) for moment in (posterior.mean, posterior.logvar))
        many = DiagonalGaussian(*repeated)  # (n * b, z, h/f, w/f)
        params = codec.likelihood_params(many.sample(noise), None if labels is None else labels.repeat(n))
        found = codec.likelihood.log_prob(params, x)
        log_likelihoods.append(found.cpu().double().view(n, b).t())
        log_ratios.append(_log_ratio(many, noise).cpu().view(n, b).t())
    log_likelihood = torch.cat(log_likelihoods, 1)
    return Bounds(log_likelihood, log_likelihood - torch.cat(log_ratios, 1), posterior.kl().cpu().double())


def _log_ratio(posterior: DiagonalGaussian, noise: torch.Tensor) -> torch.Tensor:
    """Return log q(z given x) - log p(z), (b,) float64 in nats, from z's noise: (z - mean) / std would lose digits."""
    z = posterior.sample(noise)
    return 0.5 * in_float64((z.square() - noise.square() - posterior.logvar).flatten(1)).sum(1)
