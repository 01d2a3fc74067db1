"""Measure a model on validation images, and draw its reconstructions and samples."""

import math
from collections import defaultdict
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
        parts: dict[str, list[torch.Tensor]] = defaultdict(list)
        batches = zip(*(t.split(batch) for t in (self.pixels, self.keys, self.labels)), strict=True)
        for pixels, keys, labels in batches:
            for name, value in _measure_batch(codec, pixels.to(device), keys.to(device), labels.to(device)).items():
                parts[name].append(value)
        mean = {name: torch.cat(values).mean(0) for name, values in parts.items()}
        kl, nelbo = mean["kl"].item(), mean["nelbo"].item()
        found: dict[str, float] = {}
        if "use" in parts:
            found["perplexity"] = perplexity(torch.cat(parts["use"]).sum(0))
            found["code_bpp"] = math.log2(found["perplexity"]) / codec.factor**2
        if isinstance(codec.likelihood, DiscretizedLogistic):
            found["bits_per_dim"] = nelbo / math.log(2) / math.prod(self.pixels.shape[1:])
        side = self.pixels.shape[-1]
        return found | {
            "nll": mean["nll"].item(),
            "kl": kl,
            "nelbo": nelbo,
            "kl_bpp": kl / math.log(2) / side**2,
            "psnr_mode": mean["psnr"].item(),
            "active_channels": active_channels(mean["mean"], mean["square"]),
            "kl_per_latent": kl / (codec.config.latent_channels * (side // codec.factor) ** 2),
            "clamped": mean["clamped"].item(),
            "shuffle_cost": mean["shuffle_cost"].item() if "shuffle_cost" in mean else math.nan,
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


def _measure_batch(
    codec: Codec, pixels: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return tensors with a row for each image, and the usage of a codebook's codes in one row."""
    x = codec.likelihood.observe(pixels, fold(keys, PIXELS))
    posterior = codec.encode(x, labels)
    z = posterior.sample(normal(keys, tuple(posterior.mean.shape[1:])))
    nll = -codec.likelihood.log_prob(codec.likelihood_params(z, labels), x)
    kl = posterior.kl()
    error = codec.decode_uint8(posterior.mode(), labels).float() - pixels.float()
    found = {
        "nll": nll,
        "kl": kl,
        "nelbo": nll + kl,
        "clamped": posterior.clamped.expand(len(x)),
        "psnr": 10 * torch.log10(255**2 / error.square().mean((1, 2, 3))),
        "mean": posterior.mean.mean((2, 3)),  # (b, z)
        "square": posterior.mean.square().mean((2, 3)),
    }
    if len(x) > 1:
        found["shuffle_cost"] = -codec.likelihood.log_prob(codec.likelihood_params(z.roll(1, 0), labels), x) - nll
    if isinstance(posterior, Codes):
        found["use"] = posterior.use()[None, :, 0] * len(pixels)
    return found
