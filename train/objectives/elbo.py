"""Losses. An objective owns the codec and is what Accelerate wraps: only its `forward` is called on the wrapper."""

import math

import torch
from torch import nn

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.bottlenecks import DiagonalGaussian, Posterior
from latent_codec.model.codebooks import Codes
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, uniform
from latent_codec.prior.quantizer import STEP_OF_STD, round_with_dead_zone
from train.config.vae import ELBOConfig
from train.objectives.adversarial import Adversary, Contest, last_weight, no_contest
from train.objectives.losses import PIXELS, STEP, Losses, signed


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
        return size * round_with_dead_zone(mode / size), step.clamp(min=1).square().reciprocal()

    def _charged(self, kl_map: torch.Tensor) -> torch.Tensor:
        """The KL that the loss charges, averaged over the batch."""
        if self.config.free_bits == 0:
            return kl_map.flatten(1).sum(1).mean()
        per_channel = kl_map.mean((2, 3)).clamp(min=self.config.free_bits)  # (b, z) nats per element
        return (per_channel.sum(1) * math.prod(kl_map.shape[2:])).mean()
