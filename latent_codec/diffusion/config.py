"""A latent diffusion model's configuration: travels as JSON in its file. Free of torch."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The diffusion transformer of Peebles & Xie (2023) as diffusers builds it, `DiTTransformer2DModel`."""

    size: int
    """Side of the square of latent elements that it is trained on and draws."""
    patch: int
    """Side of the square of latent elements that makes one token; divides `size`."""
    depth: int
    """Blocks."""
    heads: int
    head_width: int
    """Channels of each head: `heads` times as many have the tokens."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
        if self.size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide size {self.size}")
        if self.heads * self.head_width % 4:
            raise ValueError(
                f"heads {self.heads} x head_width {self.head_width} is no multiple of 4; positions need one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """Whose latents a diffusion model makes, and how they are labelled."""

    codec_id: str
    """The id of the model that decodes them."""
    factor: int
    """Pixels per latent element along one side."""
    mean: tuple[float, ...]
    """Per channel: what is subtracted from raw latents,"""
    std: tuple[float, ...]
    """and what they are divided by then."""
    classes: tuple[str, ...]
    """Names of the labels 0, 1 ...; none of an unconditional model."""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean or not all(value > 0 for value in self.std):
            raise ValueError(f"mean {self.mean} and std {self.std} must have one value per channel, std positive")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes {self.classes} are not distinct")

    @property
    def channels(self) -> int:
        return len(self.mean)
