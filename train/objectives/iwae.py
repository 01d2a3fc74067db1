"""Compute the importance-weighted bound (IWAE)."""

import math

import torch
from torch import nn

from latent_codec.model.bottlenecks import DiagonalGaussian
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, uniform
from train.config.vae import IWAEConfig
from train.objectives.adversarial import no_contest
from train.objectives.losses import CHOSEN, PIXELS, Losses, signed


class IWAE(nn.Module):
    """Minus the importance-weighted bound of k samples, in nats per image (Burda et al. 2016, eq. 8).

    -log (1/k) sum_i w_i, w_i = p(x given z_i) p(z_i) / q(z_i given x); a batch's loss is the average of its images'.
    Its gradient is the average of grad log w_i by the normalised weights (eq. 14). With `gradient_samples` it is that
    of as many samples drawn by those weights, the same in expectation: k samples only pass forward. `nll` and `kl` in
    its losses are those of the same model's ELBO.
    """

    def __init__(self, config: IWAEConfig, codec: Codec) -> None:
        super().__init__()
        self.config = config
        self.codec = codec

    def forward(
        self, pixels: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, beta: torch.Tensor, measure: bool
    ) -> Losses:
        """As `ELBO.forward`; `beta` must be 1 and is not used."""
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
            with torch.no_grad():  # in parts that a cache holds
                parts = [self._weigh(x, posterior, part, labels) for part in noise.split(max(few, k // 10))]
                log_prob, log_weight = (torch.cat(found) for found in zip(*parts, strict=True))
                bound = torch.logsumexp(log_weight, 0) - math.log(k)
                chosen = resampled(log_weight, few, uniform(fold(keys, CHOSEN)))  # (few, b)
                noise_of = noise.gather(0, chosen[..., None, None, None].expand(-1, *noise.shape[1:]))
            through = self._weigh(x, posterior, noise_of, labels)[1].mean(0)  # (b,)
            loss = -(bound + through - through.detach()).mean()
        with torch.no_grad():
            mse = torch.full((), math.nan, device=x.device)
            if measure:
                z = posterior.mean + posterior.std * noise[0]
                decoded = codec.likelihood.mean(codec.likelihood_params(z, labels))
                mse = (signed(codec, decoded) - signed(codec, x)).square().mean() / 4
            mean, zero = posterior.mean.detach(), torch.zeros((), device=x.device)
            return Losses(
                loss=loss,
                nll=-log_prob.detach().mean(),
                kl=posterior.kl().detach().mean(),
                nll_mode=zero,
                lpips=zero,
                mse=mse,
                clamped=posterior.clamped,
                latent_mean=mean.mean((0, 2, 3)),
                latent_square=mean.square().mean((0, 2, 3)),
                penalty=zero,
                code_use=torch.ones(1, 1, device=x.device),
                contest=torch.stack(no_contest(x)),
            )

    def _weigh(
        self, x: torch.Tensor, posterior: DiagonalGaussian, noise: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log p(x given z) and log w, (n, b) each, of noise (n, b, z, h/f, w/f)."""
        n = len(noise)
        z = posterior.mean + posterior.std * noise
        params = self.codec.likelihood_params(z.flatten(0, 1), labels.repeat(n))  # (n * b, params * c, h, w)
        log_prob = self.codec.likelihood.log_prob(params, x).unflatten(0, (n, -1))  # (n, b)
        return log_prob, log_prob + posterior.log_ratio(z)


def resampled(log_weight: torch.Tensor, n: int, offset: torch.Tensor) -> torch.Tensor:
    """Which of k samples are drawn, (n, b) int64, by weights (k, b) that need no common scale; offset (b,) in [0, 1).

    Systematic resampling (Kitagawa 1996): a share w of the weight is drawn floor(n w) or ceil(n w) times.
    """
    upto = torch.softmax(log_weight.double(), 0).cumsum(0).t().contiguous()  # (b, k)
    upto = upto / upto[:, -1:]  # (0, 1] is the samples' that weigh anything, to the bit
    at = (torch.arange(1, n + 1, device=upto.device) - offset[:, None]) / n  # (b, n) in (0, 1]
    return torch.searchsorted(upto, at).clamp(max=len(log_weight) - 1).t()  # where weights are NaN, any will do
