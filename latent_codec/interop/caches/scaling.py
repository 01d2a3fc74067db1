"""Raw latents <-> scaled ones."""

from typing import NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.interop.caches.options import Options
from latent_codec.model.file import LatentStatistics


class Scaling(NamedTuple):
    """Scaled = (raw - shift) / spread."""

    shift: torch.Tensor  # (z or 1, 1, 1)
    spread: torch.Tensor  # (z or 1, 1, 1)

    def scale(self, z: torch.Tensor) -> torch.Tensor:
        """Of raw latents (z, h, w)."""
        return (z - self.shift) / self.spread

    def unscale(self, z: torch.Tensor) -> torch.Tensor:
        return z * self.spread + self.shift


RAW = Scaling(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))


def scaling_of(options: Options, statistics: LatentStatistics | None) -> Scaling:
    """By the factors that were given, otherwise by the model's statistics; raises `UserError` if there are neither."""
    if options.scaling_factor is not None:
        return Scaling(
            torch.full((1, 1, 1), options.shift_factor or 0.0), torch.full((1, 1, 1), 1 / options.scaling_factor)
        )
    if statistics is None:
        raise UserError(
            "scaled latents need a scale, and the model has no latent statistics; give --scaling-factor, or measure "
            "them with `latent-codec export --data`"
        )
    mean, std = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
    return Scaling(mean, std)


def chosen_scaling(options: Options, statistics: LatentStatistics | None, where: str) -> Scaling:
    """By --scale, which has to be there; raises `UserError` if it is not, or contradicts the other options."""
    if options.scale is None:
        raise UserError(f"{where} may hold either kind of latents; say which with --scale raw or --scale normalized")
    if options.scale == "normalized":
        return scaling_of(options, statistics)
    if options.scaling_factor is not None:
        raise UserError("--scaling-factor is for --scale normalized; raw latents are not scaled")
    return RAW
