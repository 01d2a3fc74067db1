"""Define the options of a conversion. Free of torch, for the command line."""

import dataclasses
from typing import Literal

import tyro

from latent_codec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Choose what is written into a cache or read from one."""

    arch: str | None = None
    """kohya: sd, sdxl, sd3 or flux. musubi: hv, hv15, wan, qi, kr2, zi, f2d, f2k4b or f2k9b."""
    scale: Literal["raw", "normalized"] | None = None
    """npy, webdataset: write latents as the model gives them, or normalized."""
    scaling_factor: float | None = None
    """Scale latents to (z - shift) * factor, instead of each channel by the model's statistics."""
    shift_factor: float | None = None
    """Shift of --scaling-factor, by default 0."""
    seed: int | None = None
    """to: seed of the draw from each posterior, by default 0; MAR and EDM2 take the whole posterior."""
    epoch: int | None = None
    """to: epoch of the draw, by default 0; draws of different epochs are independent."""
    store: Literal["float16", "bfloat16", "float32"] | None = None
    """from: number type on disk, by default float16."""
    shard_images: tyro.conf.Suppress[int | None] = None
    """Most images in a shard; by default as many as the program's own tools write."""

    def check(self, used: frozenset[str], where: str) -> None:
        """Raise `UserError` for a value out of range, and for a chosen option that is not among those used there."""
        if self.scaling_factor is not None and not 0 < self.scaling_factor < float("inf"):
            raise UserError(f"--scaling-factor {self.scaling_factor:g} must be positive, such as 0.18215")
        if self.shift_factor is not None and not abs(self.shift_factor) < float("inf"):
            raise UserError(f"--shift-factor {self.shift_factor:g} must be a finite number")
        if self.shift_factor is not None and self.scaling_factor is None:
            raise UserError("--shift-factor goes with --scaling-factor; give both or neither")
        if self.epoch is not None and self.epoch < 0:
            raise UserError(f"--epoch {self.epoch} is negative; epochs count from 0")
        if self.shard_images is not None and self.shard_images < 1:
            raise UserError(f"shards of {self.shard_images} images hold none; they must have at least 1")
        chosen = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None}
        if unused := sorted(chosen - used - {"shard_images"}):
            names = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise UserError(f"{names} {'is' if len(unused) == 1 else 'are'} not for {where}; leave it out")
