"""Measure a model on validation images, and draw its reconstructions and samples."""

import math
from pathlib import Path

import torch

from latent_codec.images.geometry import in_rgb
from latent_codec.images.write import write_grid
from latent_codec.model.codebooks import Codes, perplexity
from latent_codec.model.codec import Codec
from latent_codec.model.likelihoods import DiscretizedLogistic
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import fold, normal, text_key
from train.data.crops import CentreCrops
from train.objectives.losses import PIXELS, active_channels

_COLUMNS = 8


class Validation:
    """Measure a model on fixed centre crops, with fixed noise for each."""

    def __init__(self, crops: CentreCrops) -> None:
        self.pixels = crops.pixels
        self.labels = crops.labels
        self.keys = torch.tensor([text_key(name) for name in crops.names])

    @torch.no_grad()
    def measure(self, codec: Codec, batch: int = 8) -> dict[str, float]:
        """Return averages over the images by the names that the log uses.

        nll, kl, nelbo: nats per image. kl_bpp: bits per pixel. psnr_mode: dB, of the decoded mode. active_channels:
        see `active_channels`. kl_per_latent: nats per latent element. clamped: share of clamped log-variances.
        shuffle_cost: nats per image that the latents of the image before cost instead, NaN for a single image.
        perplexity, code_bpp (bits per pixel): of a codebook. bits_per_dim: of a discretised likelihood.
        """
        device = next(codec.parameters()).device
        nll, kl, psnr, mean, square, clamped, costs, use = ([] for _ in range(8))
        batches = zip(*(t.split(batch) for t in (self.pixels, self.keys, self.labels)), strict=True)
        for pixels, keys, labels in ((t.to(device) for t in found) for found in batches):
            x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
            posterior = codec.encode(x, labels)
            z = posterior.sample(normal(keys, tuple(posterior.mean.shape[1:])))
            nll.append(-codec.likelihood.log_prob(codec.likelihood_params(z, labels), x))
            kl.append(posterior.kl())
            clamped.append(posterior.clamped.expand(len(x)))
            if len(x) > 1:
                others = codec.likelihood.log_prob(codec.likelihood_params(z.roll(1, 0), labels), x)
                costs.append(-others - nll[-1])
            error = codec.decode_uint8(posterior.mode(), labels).float() - pixels.float()
            psnr.append(10 * torch.log10(255**2 / error.square().mean((1, 2, 3))))
            mean.append(posterior.mean.mean((2, 3)))  # (b, z)
            square.append(posterior.mean.square().mean((2, 3)))
            if isinstance(posterior, Codes):
                use.append(posterior.use()[:, 0] * len(pixels))
        side = self.pixels.shape[-1]
        more: dict[str, float] = {}
        if use:
            more["perplexity"] = perplexity(torch.stack(use).sum(0))
            more["code_bpp"] = math.log2(more["perplexity"]) / codec.factor**2
        if isinstance(codec.likelihood, DiscretizedLogistic):
            nelbo = (torch.cat(nll) + torch.cat(kl)).mean().item()
            more["bits_per_dim"] = nelbo / math.log(2) / math.prod(self.pixels.shape[1:])
        elements = codec.config.latent_channels * (side // codec.factor) ** 2
        return more | {
            "nll": torch.cat(nll).mean().item(),
            "kl": torch.cat(kl).mean().item(),
            "nelbo": (torch.cat(nll) + torch.cat(kl)).mean().item(),
            "kl_bpp": torch.cat(kl).mean().item() / math.log(2) / side**2,
            "psnr_mode": torch.cat(psnr).mean().item(),
            "active_channels": active_channels(torch.cat(mean).mean(0), torch.cat(square).mean(0)),
            "kl_per_latent": torch.cat(kl).mean().item() / elements,
            "clamped": torch.cat(clamped).mean().item(),
            "shuffle_cost": torch.cat(costs).mean().item() if costs else math.nan,
        }

    @torch.no_grad()
    def write_grid(self, path: Path, codec: Codec) -> None:
        """Write a PNG with rows of inputs, decoded modes and, for a Gaussian posterior, decoded and prior samples."""
        device = next(codec.parameters()).device
        pixels, keys, labels = (t[:_COLUMNS].to(device) for t in (self.pixels, self.keys, self.labels))
        posterior = codec.encode(pixels, labels)
        shape = tuple(posterior.mean.shape[1:])
        latents = [posterior.mode()]
        if isinstance(posterior, DiagonalGaussian):
            latents += [posterior.sample(normal(keys, shape)), normal(fold(keys, 1), shape)]
        rows = torch.cat([pixels, *(codec.decode_uint8(z, labels) for z in latents)])
        write_grid(path, in_rgb(rows), len(pixels))
