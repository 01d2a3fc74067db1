"""A model's configuration: frozen dataclasses that travel as JSON inside the model file. Free of torch."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import tyro

Overlap = Annotated[int, tyro.conf.arg(aliases=("--lap",))]
"""Number of pixels; model files call the field `lap`, and so did command lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """PCA's shape: one strided convolution in, its transpose out."""

    kind: ClassVar[str] = "linear"
    patch: int
    """Pixels per latent element along one side (the downsampling factor)."""
    overlap: Overlap = dataclasses.field(default=0, metadata={"json": "lap"})
    """Pixels by which each patch extends into its neighbours on every side, 0 to `patch`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteConfig:
    """A linear patch path plus a residual network; finite receptive field, nothing at full resolution."""

    kind: ClassVar[str] = "lite"
    patch: int
    """Pixels per latent element along one side; `stem` doubled once per further resolution."""
    stem: int
    """Space-to-depth factor before the first convolution (at least 2)."""
    encoder_widths: tuple[int, ...]
    """Channels of each resolution, finest first; each resolution after the first halves the grid."""
    encoder_depths: tuple[int, ...]
    """Residual blocks of each resolution, finest first."""
    decoder_widths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    overlap: Overlap = dataclasses.field(default=0, metadata={"json": "lap"})
    """Pixels by which each patch of the linear path extends into its neighbours on every side, 0 to `patch`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """The AutoencoderKL topology of latent diffusion (Rombach et al. 2022)."""

    kind: ClassVar[str] = "conv"
    widths: tuple[int, ...]
    """Channels of each resolution, finest first (`block_out_channels`)."""
    layers_per_block: int
    groups: int
    """GroupNorm groups; divides every width."""
    mid_attention: bool
    quant_conv: bool
    post_quant_conv: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Fully connected networks; a square of `side` pixels is one vector with one latent vector."""

    kind: ClassVar[str] = "mlp"
    side: int
    """Pixels along one side of the square (28 for MNIST)."""
    encoder_widths: tuple[int, ...]
    """Hidden units of each layer, from the pixels to the latents."""
    decoder_widths: tuple[int, ...]
    """Hidden units of each layer, from the latents to the pixels."""
    activation: Literal["tanh", "relu", "silu"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagonalGaussianConfig:
    kind: ClassVar[str] = "gaussian"
    logvar_min: float
    logvar_max: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """No distribution: latents are what the encoder says, of a deterministic autoencoder."""

    kind: ClassVar[str] = "identity"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig:
    """The nearest vector of a codebook at each position (van den Oord et al. 2017)."""

    kind: ClassVar[str] = "vq"
    codes: int
    """Vectors in the codebook."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiniteScalarConfig:
    """Every channel rounded to one of a few levels (Mentzer et al. 2024)."""

    kind: ClassVar[str] = "fsq"
    levels: tuple[int, ...]
    """Of each latent channel, at least 2; their product is the size of the implied codebook."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """Normal density over pixels in [-1, 1]."""

    kind: ClassVar[str] = "gaussian"
    scale: Literal["fixed", "learned", "per_pixel"]
    """`fixed`: sigma is a constant; `learned`: one trained scalar; `per_pixel`: the decoder predicts it."""
    sigma: float
    """Standard deviation in units of [-1, 1] pixels: the constant, or the starting point."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscretizedLogisticConfig:
    """Probabilities of the 256 pixel values: a mixture of logistics integrated over each value's bin."""

    kind: ClassVar[str] = "discretized_logistic"
    components: int
    """1 for a single logistic (Kingma et al. 2016); more for a mixture (Salimans et al. 2017)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BernoulliConfig:
    """Binary pixels {0, 1}."""

    kind: ClassVar[str] = "bernoulli"
    pixels: Literal["threshold", "drawn"] = "threshold"
    """How uint8 pixels v become binary: 1 from 128 up, or drawn, 1 with probability v / 255, anew each time a sample is
    seen in training and once for all elsewhere (Burda et al. 2016). Encoding files goes by the threshold."""


BackboneConfig = LinearConfig | LiteConfig | ConvConfig | MLPConfig
BottleneckConfig = DiagonalGaussianConfig | IdentityConfig | VectorQuantizerConfig | FiniteScalarConfig
LikelihoodConfig = GaussianConfig | DiscretizedLogisticConfig | BernoulliConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Everything that says what a model's tensors mean."""

    image_channels: int
    latent_channels: int
    backbone: BackboneConfig
    bottleneck: BottleneckConfig
    likelihood: LikelihoodConfig
    classes: tuple[str, ...] = ()
    """Names of the classes (folders of images) that a conditional model is told of; none: an unconditional model."""

    @property
    def codes(self) -> int | None:
        """Of the codebook, if the bottleneck has one: latents are then whole numbers below this."""
        match self.bottleneck:
            case VectorQuantizerConfig(codes=codes):
                return codes
            case FiniteScalarConfig(levels=levels):
                return math.prod(levels)
            case _:
                return None

    @property
    def coded_channels(self) -> int:
        """Integers that a bitstream holds at each position of the latents."""
        return self.latent_channels if self.codes is None else 1
