"""Losses. An objective owns the codec and is what Accelerate wraps: only its `forward` is called on the wrapper."""

import math
from typing import NamedTuple

import torch
from torch import nn

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.bottlenecks import DiagonalGaussian, Posterior
from latent_codec.model.codebooks import Codes
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, uniform
from latent_codec.prior.quantizer import STEP_OF_STD, round_down_zone
from train.adversarial import Adversary, Contest, last_weight, no_contest
from train.config.vae import ELBOConfig, IWAEConfig

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


class ELBO(nn.Module):
    """Negative ELBO = NLL + beta KL (Kingma & Welling 2014, eq. 3; beta: Higgins et al. 2017), in nats per image.

    Free bits: a channel's KL below `free_bits` nats per latent element costs nothing. Kingma et al. (2016) take the
    minimum over a batch's average; here it is per image, so that the loss of a batch is the average of its images'.

    The mode's NLL (`mode_weight`, `mode_steps`) changes nothing for the encoder: the rate-distortion trade-off stays
    the ELBO's.

    A vector quantiser adds its commitment, and the codebook's own loss where gradients train it (van den Oord et al.
    2017, eq. 3). The KL against a uniform prior over the codes is in the bound; it is a constant.

    An adversary adds the generator's loss, and the discriminator's own.
    """

    def __init__(self, config: ELBOConfig, codec: Codec, lpips: LPIPS | None) -> None:
        """Draws the discriminator's weights, if there is to be one."""
        super().__init__()
        if (lpips is not None) != (config.lpips_weight > 0):
            raise ValueError("an LPIPS module is needed exactly when lpips_weight is positive")
        self.config = config
        self.codec = codec
        self.lpips = lpips
        settings = config.adversarial
        self.adversary = None if settings is None else Adversary(settings, codec.config.image_channels)

    def forward(
        self,
        pixels: torch.Tensor,
        keys: torch.Tensor,
        labels: torch.Tensor,
        beta: torch.Tensor,
        measure: bool,
        contest: bool = False,
    ) -> Losses:
        """pixels (b, c, h, w) uint8; keys (b,) int64 for the posterior's noise; labels (b,) int64; beta a scalar;
        `contest`: whether the adversary takes part yet.
        """
        codec = self.codec
        x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
        posterior = codec.encode(x, labels)
        z = posterior.sample(normal(keys, tuple(posterior.mean.shape[1:])))
        params = codec.likelihood_params(z, labels)
        nll = -codec.likelihood.log_prob(params, x).mean()
        kl_map = posterior.kl_map()  # (b, z, h/f, w/f)
        penalty = self._penalty(posterior)
        loss = beta * self._charged(kl_map) + penalty
        nll_mode = torch.zeros_like(nll)
        if self.config.mode_weight > 0:
            assert isinstance(posterior, DiagonalGaussian)
            mode, weight = self._decoded_mode(posterior, keys)
            nll_mode = -(weight * codec.likelihood.log_prob(codec.likelihood_params(mode, labels), x)).mean()
            loss = loss + self.config.mode_weight * nll_mode
        lpips, played = torch.zeros_like(nll), no_contest(nll)
        reconstruction = nll
        if self.lpips is not None:
            mean = codec.likelihood.mean(params)
            lpips = self.lpips(signed(codec, mean), signed(codec, x)).mean()
            reconstruction = nll + self.config.lpips_weight * math.prod(x.shape[2:]) * lpips
        loss = loss + reconstruction
        if self.adversary is not None:
            real, fake = signed(codec, x), signed(codec, codec.likelihood.mean(params))
            played = self.adversary(real, fake, reconstruction, last_weight(codec.backbone.decoder), contest)
            loss = loss + played.generator + played.discriminator
        with torch.no_grad():
            mse = torch.full_like(nll, math.nan)
            if measure:
                mse = (signed(codec, codec.likelihood.mean(params)) - signed(codec, x)).square().mean() / 4
            mean = posterior.mean.detach()
            return Losses(
                loss=loss,
                nll=nll.detach(),
                kl=kl_map.detach().flatten(1).sum(1).mean(),
                nll_mode=nll_mode.detach(),
                lpips=lpips.detach(),
                mse=mse,
                clamped=posterior.clamped,
                latent_mean=mean.mean((0, 2, 3)),
                latent_square=mean.square().mean((0, 2, 3)),
                penalty=penalty.detach(),
                code_use=posterior.use() if isinstance(posterior, Codes) else torch.ones(1, 1, device=x.device),
                contest=torch.stack(Contest(*(t.detach() for t in played))),
            )

    def _penalty(self, posterior: Posterior) -> torch.Tensor:
        """Averaged over the batch."""
        config = self.config.codebook
        if config is None or not isinstance(posterior, Codes):
            return torch.zeros((), device=posterior.mean.device)
        penalty = config.commitment * posterior.commitment()
        if config.codebook == "gradient":
            penalty = penalty + posterior.codebook_loss()
        return penalty.mean()

    @torch.no_grad()
    def _decoded_mode(self, posterior: DiagonalGaussian, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latents (b, z, h/f, w/f) of the second NLL and its weights (b,).

        The posterior's standard deviation is each image's own, not the set's that a bitstream goes by: an image's loss
        must not depend on the batch it is in.
        """
        mode = posterior.mode().detach()
        if self.config.mode_steps is None:
            return mode, torch.ones(len(mode), device=mode.device)
        low, high = (math.log(step) for step in self.config.mode_steps)
        step = torch.exp(low + (high - low) * uniform(fold(keys, STEP))).float()  # (b,)
        std = posterior.std.square().mean((2, 3), keepdim=True).sqrt()  # (b, z, 1, 1)
        size = STEP_OF_STD * std * step[:, None, None, None]
        return size * round_down_zone(mode / size), step.clamp(min=1).square().reciprocal()

    def _charged(self, kl_map: torch.Tensor) -> torch.Tensor:
        """The KL that the loss charges, averaged over the batch."""
        if self.config.free_bits == 0:
            return kl_map.flatten(1).sum(1).mean()
        per_channel = kl_map.mean((2, 3)).clamp(min=self.config.free_bits)  # (b, z) nats per element
        return (per_channel.sum(1) * math.prod(kl_map.shape[2:])).mean()


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


def signed(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    """Pixels in the likelihood's range, brought to [-1, 1]."""
    low, high = codec.likelihood.data_range
    return (x - low) * (2.0 / (high - low)) - 1.0
