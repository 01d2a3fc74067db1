"""Compute the loss of the joint phase, which trains encoder, decoder and context prior over a range of rates."""

import math

import torch
from torch import nn

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, uniform
from train.config.vae import JointConfig
from train.context_prior.network import ContextNet
from train.data.crops import CentreCrops
from train.objectives.losses import CHOSEN, PIXELS, STEP, VAELosses, bound_of, mse_of, signed
from train.objectives.prefixes import drawn_prefixes, within

_ENCODES = {"encoder", "quant_conv", "bottleneck"}
"""Parts of a codec that make latents."""

_MOST_NOISE = 1.5
"""Standard deviation of a channel's noise, over that of what it holds, up to which the decoder is shown the channel."""

MEASURED_STEPS = (0.5, 1.0, 2.0)
"""Quantiser steps at which an evaluation measures rate and distortion."""
_FINE_STEPS = (0.125, 0.25)
"""The same, of models with prefixes."""


class Joint(nn.Module):
    """Compute the negative ELBO of a posterior whose noise is scaled by a step s, under a prior that knows s.

    q_s(z given x) = N(mean, s^2 std^2), and p_s is the context prior's density at step s. The error of a coarser
    quantiser grows with s^2, and the likelihood's error may grow with it: an image's loss is NLL / s^2 + KL(q_s, p_s)
    in nats (the multi-rate form of a beta of s^2, Higgins et al. 2017), and s^2 times that where s is below 1, so that
    neither end of the range outweighs the other. The KL is -log p_s of one sample less the entropy of q_s (Balle et al.
    2017, eq. 13, with Gaussian noise and a prior that sees its context).

    A learned prior does not anchor the means, so their drift is penalised: each image also pays what N(0, I) charges
    for the means of its channels.

    The decoder also learns the mode quantised at s, and the prior the integers that a bitstream would hold; neither has
    a gradient for the encoder.

    With `decoder_alone` only the two NLLs remain, with gradients for the decoder's weights; a Bernoulli mask gives each
    image one of them.

    LPIPS of the expected pixels is added to either NLL.

    An image of a model with prefixes keeps one prefix of the channels, drawn at random: the decoder sees zeros for the
    others, and they cost nothing. Noise leaves out channels too whose noise would be far larger than what they hold.
    """

    def __init__(self, config: JointConfig, codec: Codec, prior: ContextNet, lpips: LPIPS | None = None) -> None:
        """Freeze all weights but the decoder's if the configuration says `decoder_alone`.
        Raises `ValueError` if `lpips` is given without a positive `lpips_weight`, or the other way round."""
        super().__init__()
        if (lpips is not None) != (config.lpips_weight > 0):
            raise ValueError("an LPIPS module is needed exactly when lpips_weight is positive")
        self.config, self.codec, self.prior, self.lpips = config, codec, prior, lpips
        if config.decoder_alone:
            prior.requires_grad_(False)
            for name, parameter in codec.named_parameters():
                parameter.requires_grad_(not _ENCODES & set(name.split(".")))

    def forward(
        self, pixels: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, beta: torch.Tensor, measure: bool
    ) -> VAELosses:
        """Return the losses; the arguments are those of `ELBO.forward`."""
        codec, config = self.codec, self.config
        x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
        posterior = codec.encode(x, labels)
        assert isinstance(posterior, DiagonalGaussian)
        low, high = (math.log(step) for step in config.noise_steps)
        step = torch.exp(low + (high - low) * uniform(fold(keys, STEP))).float()  # (b,)
        noise = normal(keys, tuple(posterior.mean.shape[1:]))
        z = posterior.mean + step[:, None, None, None] * posterior.std * noise
        kept, heard = self._kept(keys, step)  # (b, z) bool each
        z = torch.where(heard[:, :, None, None], z, 0) if codec.config.prefixes else z
        with torch.no_grad():
            rounded = self.prior.take(posterior.mean, step)
        coded = self.prior.code(rounded)  # the quantised mode: integers have no gradient
        mode = torch.where(kept[:, :, None, None], coded.latents, 0) if codec.config.prefixes else coded.latents
        balance = torch.where(kept.all(1), step.clamp(max=1) ** (config.fine_weight - 2), 1)  # (b,)
        coarse = balance * step.clamp(min=1).square().reciprocal()  # (b,) weight of distortions, 1 / step^2 above 1
        weight, lpips_weight = config.mode_weight, config.lpips_weight * math.prod(x.shape[2:])
        if config.decoder_alone:  # a mask chooses between mode and draw in proportion to the NLLs' weights
            masked = uniform(fold(keys, CHOSEN)) * (1 + weight) < weight  # (b,)
            params = codec.likelihood_params(torch.where(masked[:, None, None, None], mode, z), labels)
            either, lpips = self._errors(params, x)
            either = either * (1 + weight)
            loss = (coarse * (either + (1 + weight) * (lpips_weight * lpips))).mean()
            nll, nll_mode = torch.where(masked, 0, either), torch.where(masked, either / max(weight, 1e-9), 0)
            kl = torch.zeros_like(nll)
        else:
            params = codec.likelihood_params(z, labels)
            nll, lpips = self._errors(params, x)
            kl = torch.where(heard, self.kl(posterior, z, step), 0).sum(1)
            nll_mode, lpips_mode = self._errors(codec.likelihood_params(mode, labels), x)
            distortion = coarse * (nll + weight * nll_mode + lpips_weight * (lpips + weight * lpips_mode))
            integers = (coded.channel_bits * kept).sum(1) * z.shape[2:].numel() * math.log(2)  # (b,) nats
            drift = 0.5 * posterior.mean.mean((2, 3)).square().sum(1) * z.shape[2:].numel()  # (b,) nats
            fine = balance * step.clamp(max=1).square()  # (b,) weight of rates
            loss = (distortion + fine * (beta * kl + integers + drift)).mean()
        with torch.no_grad():
            mse = mse_of(codec, params, x) if measure else None
            bound = bound_of(posterior, nll.mean(), kl.mean(), mse)
            weighed = (coarse * nll_mode).mean() if weight > 0 else None
            return VAELosses(loss, bound, weighed, lpips=None if self.lpips is None else lpips.mean())

    def _kept(self, keys: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which channels of each image are kept, (b, z) bool, and which of them also under noise at its step."""
        codec = self.codec.config
        number = drawn_prefixes(codec.prefixes, self.config.prefix_share, keys, codec.latent_channels)
        kept = within(number, codec.latent_channels)
        loud = step[:, None] > _MOST_NOISE * self.prior.equal_noise  # (b, z)
        return kept, kept & ~loud if codec.prefixes else kept

    def _errors(self, params: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the NLL (b,) of each image in nats and the LPIPS (b,) of its expected pixels, 0 if that is off."""
        nll = -self.codec.likelihood.log_prob(params, x)
        if self.lpips is None:
            return nll, torch.zeros_like(nll)
        mean = self.codec.likelihood.mean(params)
        return nll, self.lpips(signed(self.codec, mean), signed(self.codec, x))

    def kl(self, posterior: DiagonalGaussian, z: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Estimate KL(q_s, p_s) of each image's channels in nats, (b, z), from a sample z; the entropy of q_s is exact.
        The prior's density is its mass of a quantiser's cell around z over the cell's size."""
        n = z.shape[2:].numel()
        mass = self.prior.code(self.prior.take(z, step, exact=True)).channel_bits * n * math.log(2)  # (b, z)
        cell = self.prior.channel_steps.log()[self.prior.inverse] * n  # at step 1; the step itself cancels
        entropy = posterior.std.log().sum((2, 3)) + 0.5 * math.log(2 * math.pi * math.e) * n
        return mass + cell - entropy


@torch.no_grad()
def measure(
    prior: ContextNet, codec: Codec, crops: CentreCrops, lpips: LPIPS | None, batch: int = 8
) -> dict[str, float]:
    """Measure the images' quantised modes at each of `MEASURED_STEPS`: return the bits per pixel under the prior and
    the PSNR in decibels as `bpp_step_S` and `psnr_step_S`, and with `lpips` also `lpips_step_S`. The mode's PSNR by a
    model's prefixes is `psnr_channels_N`."""
    device = next(codec.parameters()).device
    values: dict[str, float] = {}
    means = [codec.encode(p.to(device)).mean for p in crops.pixels.split(batch)]
    for channels in codec.config.prefixes:
        psnr = [_psnr(codec, m[:, :channels], p) for m, p in zip(means, crops.pixels.split(batch), strict=True)]
        values[f"psnr_channels_{channels}"] = torch.cat(psnr).mean().item()
    for step in MEASURED_STEPS if not codec.config.prefixes else _FINE_STEPS + MEASURED_STEPS:
        bits, psnr, distances = [], [], []
        for mean, pixels in zip(means, crops.pixels.split(batch), strict=True):
            coded = prior.code(prior.take(mean, torch.full((len(mean),), step, device=device)))
            bits.append(coded.bits / codec.factor**2)
            if lpips is not None:
                decoded, original = codec.decode_uint8(coded.latents), pixels.to(device)
                distances.append(lpips(decoded / 127.5 - 1, original / 127.5 - 1))
            psnr.append(_psnr(codec, coded.latents, pixels))
        values[f"bpp_step_{step:g}"] = torch.cat(bits).mean().item()
        values[f"psnr_step_{step:g}"] = torch.cat(psnr).mean().item()
        if distances:
            values[f"lpips_step_{step:g}"] = torch.cat(distances).mean().item()
    return values


def _psnr(codec: Codec, z: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return the PSNR (b,) in decibels of decoded latents against pixels (b, c, h, w) uint8."""
    error = (codec.decode_uint8(z).float() - pixels.to(z.device)).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error.clamp(min=1e-6))
