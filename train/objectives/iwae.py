"""Compute the importance-weighted bound (IWAE)."""

import math

import torch
from torch import nn

from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, uniform
from latent_codec.precision import in_float64
from train.config.vae import IWAEConfig
from train.objectives.losses import CHOSEN, PIXELS, VAELosses, bound_of, mse_of


class IWAE(nn.Module):
    """Compute minus the importance-weighted bound of k samples, in nats per image (Burda et al. 2016, eq. 8).

    The bound is log (1/k) sum_i w_i with w_i = p(x given z_i) p(z_i) / q(z_i given x). Its gradient is the average of
    grad log w_i under the normalised weights (eq. 14). With `gradient_samples` the gradient passes through that many
    samples only, drawn in proportion to the weights: the same in expectation, and k samples need a forward pass alone.
    """

    def __init__(self, config: IWAEConfig, codec: Codec) -> None:
        super().__init__()
        self.config = config
        self.codec = codec

    def forward(
        self, pixels: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, beta: torch.Tensor, measure: bool
    ) -> VAELosses:
        """Return the losses; the arguments are those of `ELBO.forward`, and `beta`, which must be 1, is not used."""
        codec, k, few = self.codec, self.config.samples, self.config.gradient_samples
        x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
        posterior = codec.encode(x, labels)
        assert isinstance(posterior, DiagonalGaussian)
        noise = normal(keys, (k, *posterior.mean.shape[1:])).transpose(0, 1)  # (k, b, z, h/f, w/f)
        if few == 0:
            log_prob, log_weight = self._weigh(x, posterior, noise, labels)  # (k, b) each
            bound = torch.logsumexp(log_weight, 0) - math.log(k)  # (b,)
            loss = -bound.mean()
        else:
            with torch.no_grad():  # in parts that fit into a cache
                parts = [self._weigh(x, posterior, part, labels) for part in noise.split(max(few, k // 10))]
                log_prob, log_weight = (torch.cat(found) for found in zip(*parts, strict=True))
                bound = torch.logsumexp(log_weight, 0) - math.log(k)
                chosen = resampled(log_weight, few, uniform(fold(keys, CHOSEN)))  # (few, b)
                noise_of = noise.gather(0, chosen[..., None, None, None].expand(-1, *noise.shape[1:]))
            through = self._weigh(x, posterior, noise_of, labels)[1].mean(0)  # (b,)
            loss = -(bound + through - through.detach()).mean()
        mse = None
        if measure:
            with torch.no_grad():
                mse = mse_of(codec, codec.likelihood_params(posterior.mean + posterior.std * noise[0], labels), x)
        return VAELosses(loss, bound_of(posterior, -log_prob.mean(), posterior.kl().mean(), mse))

    def _weigh(
        self, x: torch.Tensor, posterior: DiagonalGaussian, noise: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p(x given z) and log w, (n, b) each, for noise (n, b, z, h/f, w/f)."""
        n = len(noise)
        z = posterior.mean + posterior.std * noise
        params = self.codec.likelihood_params(z.flatten(0, 1), labels.repeat(n))  # (n * b, params * c, h, w)
        log_prob = self.codec.likelihood.log_prob(params, x).unflatten(0, (n, -1))  # (n, b)
        return log_prob, log_prob + posterior.log_ratio(z)


def resampled(log_weight: torch.Tensor, n: int, offset: torch.Tensor) -> torch.Tensor:
    """Draw n of k samples for each image by systematic resampling (Kitagawa 1996); return their numbers (n, b) int64.

    `log_weight` (k, b) needs no common scale, and `offset` (b,) lies in [0, 1). A sample with a share w of the weight
    is drawn floor(n w) or ceil(n w) times.
    """
    upto = torch.softmax(in_float64(log_weight), 0).cumsum(0).t().contiguous()  # (b, k)
    upto = upto / upto[:, -1:]  # samples of zero weight own no part of (0, 1], exactly
    at = (torch.arange(1, n + 1, device=upto.device) - in_float64(offset)[:, None]) / n  # (b, n) in (0, 1]
    chosen = torch.searchsorted(upto, at).clamp(max=len(log_weight) - 1).t()  # NaN weights may choose any
    return chosen.to(log_weight.device)
