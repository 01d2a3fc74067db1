"""Compute the negative ELBO and the terms that may be added to it.
An objective owns the codec and is what Accelerate wraps, so that only its `forward` is called."""

import math

import torch
from torch import nn

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codebooks import Codes
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian, Posterior
from latent_codec.noise import fold, normal, uniform
from latent_codec.prior.quantizer import STEP_OF_STD, round_with_dead_zone
from train.config.vae import ELBOConfig
from train.objectives.adversarial import Adversary, last_weight
from train.objectives.losses import PIXELS, STEP, CodeLosses, VAELosses, bound_of, map_losses, mse_of, signed
from train.objectives.prefixes import drawn_prefixes, within


class ELBO(nn.Module):
    """Compute NLL + beta KL in nats per image (Kingma & Welling 2014, eq. 3; beta: Higgins et al. 2017).

    Free bits: a channel's KL below `free_bits` nats per latent element costs nothing. Kingma et al. (2016) take the
    minimum over a batch's average; here it is taken per image, so that a batch's loss is the average of its images'.

    The NLL of the mode (`mode_weight`, `mode_steps`) has no gradient for the encoder: the rate-distortion trade-off
    remains that of the ELBO.

    A vector quantiser adds its commitment loss and, where gradients train the codebook, the codebook's loss (van den
    Oord et al. 2017, eq. 3). The KL against a uniform prior over the codes is a constant of the bound.

    An image of a model with prefixes keeps one prefix of the channels: the decoder sees zeros for the others, which
    cost nothing.

    An adversary adds the generator's loss and the discriminator's.
    """

    def __init__(self, config: ELBOConfig, codec: Codec, lpips: LPIPS | None) -> None:
        """Draw the weights of the discriminator, if there is one.
        Raises `ValueError` if `lpips` is given without a positive `lpips_weight`, or the other way round."""
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
        adversarial: bool = False,
    ) -> VAELosses:
        """Return the losses of pixels (b, c, h, w) uint8.

        `keys` (b,) int64 determine all noise, `labels` (b,) int64 are the classes and `beta` () weighs the KL.
        `measure` asks for the MSE, and `adversarial` says whether the adversary takes part yet.
        """
        codec = self.codec
        x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
        posterior = codec.encode(x, labels)
        z = posterior.sample(normal(keys, tuple(posterior.mean.shape[1:])))
        kept = self._kept(keys)  # (b, z, 1, 1) bool, or None for all channels
        z = z if kept is None else torch.where(kept, z, 0)
        params = codec.likelihood_params(z, labels)
        nll = -codec.likelihood.log_prob(params, x).mean()
        kl_map = posterior.kl_map()  # (b, z, h/f, w/f)
        kl_map = kl_map if kept is None else torch.where(kept, kl_map, 0)
        penalty = self._penalty(posterior)
        loss = beta * self.charged_kl(kl_map) + penalty
        nll_mode = lpips = codes = adversary_losses = None
        if self.config.mode_weight > 0:
            assert isinstance(posterior, DiagonalGaussian)
            mode, weight = self.decoded_mode(posterior, keys)
            mode = mode if kept is None else torch.where(kept, mode, 0)
            nll_mode = -(weight * codec.likelihood.log_prob(codec.likelihood_params(mode, labels), x)).mean()
            loss = loss + self.config.mode_weight * nll_mode
        reconstruction = nll
        if self.lpips is not None:
            lpips = self.lpips(signed(codec, codec.likelihood.mean(params)), signed(codec, x)).mean()
            reconstruction = nll + self.config.lpips_weight * math.prod(x.shape[2:]) * lpips
        loss = loss + reconstruction
        if self.adversary is not None:
            real, fake = signed(codec, x), signed(codec, codec.likelihood.mean(params))
            adversary_losses = self.adversary(
                real, fake, reconstruction, last_weight(codec.backbone.get_submodule("decoder")), adversarial
            )
            loss = loss + adversary_losses.generator + adversary_losses.discriminator
        if isinstance(posterior, Codes):
            codes = CodeLosses(penalty, posterior.use())
        mse = mse_of(codec, params, x) if measure else None
        bound = bound_of(posterior, nll, kl_map.flatten(1).sum(1).mean(), mse)
        detached = map_losses(torch.Tensor.detach, VAELosses(loss, bound, nll_mode, codes, lpips, adversary_losses))
        return detached._replace(loss=loss)

    def _kept(self, keys: torch.Tensor) -> torch.Tensor | None:
        config = self.codec.config
        if not config.prefixes:
            return None
        number = drawn_prefixes(config.prefixes, self.config.prefix_share, keys, config.latent_channels)
        return within(number, config.latent_channels)[:, :, None, None]

    def _penalty(self, posterior: Posterior) -> torch.Tensor:
        config = self.config.codebook
        if config is None or not isinstance(posterior, Codes):
            return torch.zeros((), device=posterior.mean.device)
        penalty = config.commitment * posterior.commitment()
        if config.codebook == "gradient":
            penalty = penalty + posterior.codebook_loss()
        return penalty.mean()

    @torch.no_grad()
    def decoded_mode(self, posterior: DiagonalGaussian, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the second NLL's latents (b, z, h/f, w/f) and weights (b,). Channel steps follow each image's own
        posterior, not the data set's as in a bitstream: an image's loss must not depend on its batch."""
        mode = posterior.mode().detach()
        if self.config.mode_steps is None:
            return mode, torch.ones(len(mode), device=mode.device)
        low, high = (math.log(step) for step in self.config.mode_steps)
        step = torch.exp(low + (high - low) * uniform(fold(keys, STEP))).float()  # (b,)
        std = posterior.std.square().mean((2, 3), keepdim=True).sqrt()  # (b, z, 1, 1)
        size = STEP_OF_STD * std * step[:, None, None, None]
        return size * round_with_dead_zone(mode / size), step.clamp(min=1).square().reciprocal()

    def charged_kl(self, kl_map: torch.Tensor) -> torch.Tensor:
        """Return the KL that the loss charges, with free bits, as an average over the batch of kl_map (b, z, h, w)."""
        if self.config.free_bits == 0:
            return kl_map.flatten(1).sum(1).mean()
        per_channel = kl_map.mean((2, 3)).clamp(min=self.config.free_bits)  # (b, z) nats per element
        return (per_channel.sum(1) * math.prod(kl_map.shape[2:])).mean()
