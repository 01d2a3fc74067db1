"""Estimate the NLL of images by importance sampling: `python -m tools.mnist.nll MODEL IMAGES`."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from einops import rearrange
from tqdm import tqdm

from latent_codec.evaluation.bounds import bounds
from latent_codec.folders.batching import batches
from latent_codec.images.geometry import in_channels
from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, text_key
from tools.benchmark.record import machine, report
from tools.program import main


@dataclasses.dataclass(frozen=True, kw_only=True)
class NLLOptions:
    """Choose the model, the images and the number of samples."""

    model: tyro.conf.Positional[str]
    """Model file or a shipped model's name; for a run, RUN/checkpoints/step-*/ema.safetensors."""
    images: tyro.conf.Positional[Path]
    """Folder, tar or IDX file of images whose sides are multiples of the model's factor."""
    samples: int = 5000
    """Latent samples per image."""
    first: int | None = None
    """Number of images to use, those whose names hash lowest. None: all."""
    batch_size: int = 20
    """Images per batch."""
    at_once: int = 2000
    """Latents to decode at once; changes memory, not results."""
    seed: int = 0
    """Seed of the samples and of binarised pixels."""
    device: str = "cpu"
    """Device to run on."""
    out: Path | None = None
    """JSON file for the results."""

    def run(self) -> None:
        """Print the results as JSON."""
        protocol = (
            "nats per image; importance-weighted bound, Burda et al. 2016, eq. 8; drawn pixels fixed by seed and name; "
            "active: variance of the posterior mean above 0.01"
        )
        about = {"model": Path(self.model).name, "set": self.images.name, "protocol": protocol}
        report(estimate(self)._asdict(), about | machine(self.device), self.out)


class NLLEstimate(NamedTuple):
    """Report averages over the images in nats, and counts."""

    images: int
    samples: int
    nll: float
    """The negative importance-weighted bound."""
    nll_standard_error: float
    """Standard error over the images. The bound's own noise is far below it."""
    nelbo: float
    kl: float
    active: int
    """Latents, out of `latents`, whose posterior mean has a variance above 0.01 over images and positions."""
    latents: int
    batches_below_elbo: int
    """Batches whose bound is below their ELBO with exact KL, which happens only by chance."""


def estimate(options: NLLOptions) -> NLLEstimate:
    """Estimate the NLL of the images."""
    codec = Codec.load(options.model, options.device)
    sources = sorted(find_images(options.images), key=lambda s: text_key(s.name))[: options.first]
    iwae, elbo, kl, mean = [], [], [], []
    channels = codec.config.image_channels
    read = ((s, in_channels(s.read().pixels, channels)) for s in tqdm(sources, "nll", unit="image", disable=None))
    for batch in batches(read, options.batch_size, lambda one: one[1].shape, alone=lambda one: False):
        pixels = torch.stack([p for _, p in batch]).to(options.device)
        keys = fold(options.seed, torch.tensor([text_key(s.name) for s, _ in batch]))
        labels = codec.class_numbers([s.label for s, _ in batch]).to(options.device)
        found = bounds(codec, pixels, keys, options.samples, at_once=options.at_once, labels=labels)
        iwae.append(found.iwae)
        elbo.append(found.elbo)
        kl.append(found.kl)
        mean.append(_means(codec, pixels, keys, labels))
    nll, means = -torch.cat(iwae), torch.cat(mean)
    return NLLEstimate(
        images=len(nll),
        samples=options.samples,
        nll=nll.mean().item(),
        nll_standard_error=nll.std().item() / math.sqrt(len(nll)),
        nelbo=-torch.cat(elbo).mean().item(),
        kl=torch.cat(kl).mean().item(),
        active=int((means.var(0, correction=0) > 0.01).sum()),
        latents=means.shape[1],
        batches_below_elbo=sum(bool(i.mean() < e.mean()) for i, e in zip(iwae, elbo, strict=True)),
    )


@torch.inference_mode()
def _means(codec: Codec, pixels: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the posterior means (n, z) float64 of all images and positions."""
    x = codec.likelihood.observe(pixels, keys.to(pixels.device))
    return rearrange(codec.encode(x, labels).mean, "b z h w -> (b h w) z").cpu().double()


if __name__ == "__main__":
    main("tools.mnist.nll", NLLOptions, __doc__)
