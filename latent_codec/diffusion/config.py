"""Configure a latent diffusion model and sampling from it. Free of torch."""

import dataclasses
import math
from typing import Literal

from latent_codec.errors import UserError
from latent_codec.storage.files import check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Configure the diffusion transformer of Peebles & Xie (2023), diffusers' `DiTTransformer2DModel`."""

    size: int
    """Side of the square of latent positions that the model is trained on and draws."""
    patch: int
    """Side of the square of latent positions that makes one token; divides `size`."""
    depth: int
    """Number of transformer blocks."""
    heads: int
    """Number of attention heads."""
    head_width: int
    """Channels of each head. A token has `heads` times as many."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide size {self.size}")
        if self.heads * self.head_width % 4:
            raise ValueError(
                f"heads {self.heads} x head_width {self.head_width} is no multiple of 4, which position embeddings need"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Identify the latents that a diffusion model draws, and name their labels."""

    codec_id: str
    """The id of the model that decodes them."""
    factor: int
    """Pixels per latent position along one side."""
    mean: tuple[float, ...]
    """Mean of raw latents per channel."""
    std: tuple[float, ...]
    """Standard deviation of raw latents per channel."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1 ...; empty for an unconditional model."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or not all(value > 0 for value in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must have one value per channel, std positive")
        for name in self.classes:
            check_name(name)  # it becomes a folder's
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes {self.classes} are not distinct")

    @property
    def channels(self) -> int:
        """Number of latent channels."""
        return len(self.mean)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Choose how images are drawn and written."""

    guidance: float = 1.0
    """Scale of classifier-free guidance: 1 is the model as it is, 1.5 to 4 make images more typical of their label."""
    steps: int = 50
    """Steps from noise to image: as many runs of the network, twice as many with guidance."""
    seed: int = 0
    """Seed. An image depends on it, its label and its number alone."""
    image_format: Literal["png", "webp", "jpg"] = "png"
    """File format of the images."""
    overwrite: bool = False
    """Draw existing images again, including those drawn with other options."""

    def check(self) -> None:
        """Raise `UserError` for values out of range."""
        if self.steps < 1 or not math.isfinite(self.guidance):
            raise UserError(f"--steps {self.steps} must be at least 1, and --guidance {self.guidance} a finite number")
