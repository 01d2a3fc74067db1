"""What a conversion can be told. Free of torch."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from latent_codec.errors import UserError

CacheName = Literal["kohya", "musubi", "comfyui", "lightningdit", "mar", "edm2", "webdataset", "npy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """None where nothing was said."""

    arch: str | None
    """Architecture that the files are for."""
    scale: Literal["raw", "normalized"] | None
    """Latents as the model gives them, or scaled; where the consumer does not settle it."""
    scaling_factor: float | None
    """Scaled latents are (z - shift) * factor; without it the model's statistics scale each channel."""
    shift_factor: float | None
    seed: int | None
    epoch: int | None
    """Which draw, as of `Latents`."""

    def __post_init__(self) -> None:
        """Raises `UserError`."""
        if self.scaling_factor is not None and not 0 < self.scaling_factor < float("inf"):
            raise UserError(f"--scaling-factor {self.scaling_factor:g} must be positive, such as 0.18215")
        if self.shift_factor is not None and not abs(self.shift_factor) < float("inf"):
            raise UserError(f"--shift-factor {self.shift_factor:g} must be a finite number")
        if self.shift_factor is not None and self.scaling_factor is None:
            raise UserError("--shift-factor goes with --scaling-factor; give both or neither")
        if self.epoch is not None and self.epoch < 0:
            raise UserError(f"--epoch {self.epoch} is negative; epochs count from 0")

    def check(self, takes: Iterable[str], where: str) -> None:
        """Raise `UserError` if something was said that makes no difference there."""
        given = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        if extra := sorted(set(given) - set(takes)):
            names = " and ".join(f"--{name.replace('_', '-')}" for name in extra)
            raise UserError(f"{names} {'is' if len(extra) == 1 else 'are'} not for {where}; leave it out")
