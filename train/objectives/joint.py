"""The joint phase: encoder, decoder and context prior trained together over a range of rates."""

import math

import torch
from torch import nn

from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.bottlenecks import DiagonalGaussian
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal, uniform
from train.config.vae import JointConfig
from train.context_prior.network import ContextNet
from train.data.crops import CentreCrops
from train.objectives.adversarial import no_contest
from train.objectives.losses import CHOSEN, PIXELS, STEP, Losses, signed

_ENCODES = {"encoder", "quant_conv"}
"""Parts of a backbone that make latents."""

MEASURED = (0.5, 1.0, 2.0)
"""Steps at which a run says what its latents cost and what they are worth."""


class Joint(nn.Module):
    """The ELBO of a posterior whose noise is scaled by a step s, under a prior that knows s, in nats per image.

    q_s(z given x) = N(mean, s^2 std^2); p_s is the context prior's density at step s. As a coarser quantiser's error
    grows with s^2, so may the likelihood's: for each image NLL / s^2 + KL(q_s, p_s) (the multi-rate objective that a
    beta of s^2 makes of the VAE's, Higgins et al. 2017), and all of it times s^2 where s is below 1, so that neither
    end outweighs the other. The KL is -log p_s of the one sample, less the entropy of q_s (Balle et al. 2017, eq. 13,
    with Gaussian noise and a prior that sees its context).

    A prior that learns would follow latents anywhere, and they do wander off, beyond what its inputs can show. So each
    image also pays what N(0, I) charges for its channels' means.

    The decoder also learns the mode quantised at s, and the prior the integers that a bitstream would hold; both
    change nothing for the encoder.

    With `decoder_alone` only the two NLLs are left, of the decoder's weights; each image has one of them, by lot.

    LPIPS of what is decoded is added to either NLL.
    """

    def __init__(self, config: JointConfig, codec: Codec, prior: ContextNet, lpips: LPIPS | None = None) -> None:
        """With `decoder_alone` no other weights of `codec` and `prior` will have a gradient."""
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
    ) -> Losses:
        """As `train.objectives.elbo.ELBO.forward`; `kl` in the losses is that of the steps drawn."""
        codec, prior = self.codec, self.prior
        x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
        posterior = codec.encode(x, labels)
        assert isinstance(posterior, DiagonalGaussian)
        low, high = (math.log(step) for step in self.config.noise_steps)
        step = torch.exp(low + (high - low) * uniform(fold(keys, STEP))).float()  # (b,)
        noise = normal(keys, tuple(posterior.mean.shape[1:]))
        z = posterior.mean + step[:, None, None, None] * posterior.std * noise  # (b, z, h/f, w/f)
        with torch.no_grad():
            rounded = prior.rounded(posterior.mean, step)
        coded = prior.code(rounded)  # what the latents are has no gradient
        coarse, fine = step.clamp(min=1).square().reciprocal(), step.clamp(max=1).square()
        weight = self.config.mode_weight
        if self.config.decoder_alone:
            lot = uniform(fold(keys, CHOSEN)) * (1 + weight) < weight  # (b,)
            params = codec.likelihood_params(torch.where(lot[:, None, None, None], coded.latents, z), labels)
            either, lpips = self._errors(params, x)  # (b,)
            looks = self._nats(lpips, x)
            either = either * (1 + weight)
            nll, nll_mode = torch.where(lot, 0, either), torch.where(lot, either / max(weight, 1e-9), 0)
            kl = torch.zeros_like(nll)
            loss = (coarse * (either + (1 + weight) * looks)).mean()
        else:
            params = codec.likelihood_params(z, labels)
            nll, lpips = self._errors(params, x)  # (b,)
            kl = self._kl(posterior, z, step)  # (b,)
            nll_mode, lpips_mode = self._errors(codec.likelihood_params(coded.latents, labels), x)  # (b,)
            looks = self._nats(lpips + weight * lpips_mode, x)
            integers = coded.bits * z.shape[2:].numel() * math.log(2)  # (b,) nats
            off_centre = 0.5 * posterior.mean.mean((2, 3)).square().sum(1) * z.shape[2:].numel()  # (b,) nats
            loss = (coarse * (nll + weight * nll_mode + looks) + fine * (beta * kl + integers + off_centre)).mean()
        with torch.no_grad():
            mse = torch.full((), math.nan, device=x.device)
            if measure:
                mse = (signed(codec, codec.likelihood.mean(params)) - signed(codec, x)).square().mean() / 4
            mean, zero = posterior.mean, torch.zeros((), device=x.device)
            return Losses(
                loss=loss,
                nll=nll.mean(),
                kl=kl.mean(),
                nll_mode=(coarse * nll_mode).mean(),
                lpips=lpips.mean(),
                mse=mse,
                clamped=posterior.clamped,
                latent_mean=mean.mean((0, 2, 3)),
                latent_square=mean.square().mean((0, 2, 3)),
                penalty=zero,
                code_use=torch.ones(1, 1, device=x.device),
                contest=torch.stack(no_contest(x)),
            )

    def _errors(self, params: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL of each image x in nats, and LPIPS of its expected pixels, 0 where that is left out, (b,) both."""
        nll = -self.codec.likelihood.log_prob(params, x)
        if self.lpips is None:
            return nll, torch.zeros_like(nll)
        mean = self.codec.likelihood.mean(params)
        return nll, self.lpips(signed(self.codec, mean), signed(self.codec, x))

    def _nats(self, lpips: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What LPIPS (b,) of images x counts."""
        return self.config.lpips_weight * math.prod(x.shape[2:]) * lpips

    def _kl(self, posterior: DiagonalGaussian, z: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """KL(q_s, p_s) of each image in nats, (b,), by one sample; the entropy of q_s is exact.

        The prior gives the mass of a quantiser's cell around z; its density is that over the cell's size.
        """
        mass = self.prior.code(self.prior.noisy(z, step)).bits * z.shape[2:].numel() * math.log(2)  # (b,)
        cell = (
            self.prior.channel_steps.log().sum() * z.shape[2:].numel()
        )  # of step 1; the step itself is in both and cancels
        entropy = posterior.std.log().flatten(1).sum(1) + 0.5 * math.log(2 * math.pi * math.e) * z[0].numel()
        return mass + cell - entropy


@torch.no_grad()
def measure(
    prior: ContextNet, codec: Codec, crops: CentreCrops, lpips: LPIPS | None, batch: int = 8
) -> dict[str, float]:
    """At each of `MEASURED` steps: bits per pixel of rounded latents under the prior, PSNR of what they decode to and,
    if it is there to measure it, LPIPS."""
    device = next(codec.parameters()).device
    values: dict[str, float] = {}
    means = [codec.encode(p.to(device)).mean for p in crops.pixels.split(batch)]
    for step in MEASURED:
        bits, psnr, distances = [], [], []
        for mean, pixels in zip(means, crops.pixels.split(batch), strict=True):
            coded = prior.code(prior.rounded(mean, torch.full((len(mean),), step, device=device)))
            bits.append(coded.bits / codec.factor**2)
            decoded, original = codec.decode_uint8(coded.latents).float(), pixels.to(device).float()
            error = decoded - original
            if lpips is not None:
                distances.append(lpips(decoded / 127.5 - 1, original / 127.5 - 1))
            psnr.append(10 * torch.log10(255**2 / error.square().mean((1, 2, 3)).clamp(min=1e-6)))
        values[f"bpp_step_{step:g}"] = torch.cat(bits).mean().item()
        values[f"psnr_step_{step:g}"] = torch.cat(psnr).mean().item()
        if distances:
            values[f"lpips_step_{step:g}"] = torch.cat(distances).mean().item()
    return values
