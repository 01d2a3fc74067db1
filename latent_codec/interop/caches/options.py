"""Define the options of a conversion. Free of torch, for the command line."""

import dataclasses
from typing import Literal

from latent_codec.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Choose what is written into a cache or read from one; None where the user chose nothing."""

    arch: str | None = None
    """Architecture that the files are for."""
    scale: Literal["raw", "normalized"] | None = None
    """Latents as the model gives them, or scaled, where the program does not settle it."""
    scaling_factor: float | None = None
    """Scaled latents are (z - shift) * factor; without it the model's statistics scale each channel."""
    shift_factor: float | None = None
    seed: int | None = None
    """Seed of the draws, as of `Latents`; 0 by default."""
    epoch: int | None = None
    """Epoch of the draws, from 0; 0 by default."""
    store: Literal["float16", "bfloat16", "float32"] | None = None
    """Number type of latents read from a cache; float16 by default."""
    shard_images: int | None = None
    """Most images in a shard; by default as many as the program's own tools write."""

    def __post_init__(self) -> None:
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

    def check(self, used: frozenset[str], where: str) -> None:
        """Raise `UserError` for a chosen option that is not among those used there."""
        chosen = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None}
        if unused := sorted(chosen - used - {"shard_images"}):
            names = " and ".join(f"--{name.replace('_', '-')}" for name in unused)
            raise UserError(f"{names} {'is' if len(unused) == 1 else 'are'} not for {where}; leave it out")
