"""Convert raw latents to scaled ones and back."""

from typing import NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.model.file import LatentStatistics


class Scaling(NamedTuple):
    """Scale latents (z, h, w): scaled = (raw - shift) / spread. Both are (z or 1, 1, 1)."""

    shift: torch.Tensor
    spread: torch.Tensor

    def scale(self, z: torch.Tensor) -> torch.Tensor:
        """Return scaled latents."""
        return (z - self.shift) / self.spread

    def unscale(self, z: torch.Tensor) -> torch.Tensor:
        """Return raw latents of all channels or of the first ones."""
        return z * self.spread[: len(z)] + self.shift[: len(z)]


RAW = Scaling(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def scaling_of(options: CacheOptions, statistics: LatentStatistics | None) -> Scaling:
    """Return the scaling by the options' factors or else by the statistics; raises `UserError` if there are neither."""
    if options.scaling_factor is not None:
        shift, spread = options.shift_factor or 0.0, 1 / options.scaling_factor
        return Scaling(torch.full((1, 1, 1), shift), torch.full((1, 1, 1), spread))
    if statistics is None:
        raise UserError(
            "scaled latents need a scale, and the model has no latent statistics; give --scaling-factor, or measure "
            "them with `latent-codec export --data`"
        )
    mean, std = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
    return Scaling(mean, std)


def chosen_scaling(options: CacheOptions, statistics: LatentStatistics | None, where: str) -> Scaling:
    """Return the scaling that --scale names; raises `UserError` if it is missing or contradicts other options."""
    if options.scale is None:
        raise UserError(f"{where} may hold either kind of latents; say which with --scale raw or --scale normalized")
    if options.scale == "normalized":
        return scaling_of(options, statistics)
    if options.scaling_factor is not None:
        raise UserError("--scaling-factor is for --scale normalized; raw latents are not scaled")
    return RAW


def prescribed_scaling(scaled: bool, options: CacheOptions, statistics: LatentStatistics | None, files: str) -> Scaling:
    """Return the scaling that a program prescribes; raises `UserError` for a factor where files hold raw latents."""
    if scaled:
        return scaling_of(options, statistics)
    if options.scaling_factor is not None:
        raise UserError(f"--scaling-factor is for scaled latents, and {files} files hold raw latents; leave it out")
    return RAW
