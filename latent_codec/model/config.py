"""Configure a model by frozen dataclasses, which its file holds as JSON; this module does not import torch."""

import dataclasses
import math
from typing import Annotated, ClassVar, Literal

import tyro

Overlap = Annotated[int, tyro.conf.arg(aliases=("--lap",))]
"""A number of pixels; model files call the field `lap`, and so did command lines."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Configures PCA as a network: one strided convolution, and its transpose."""

    kind: ClassVar[str] = "linear"
    patch: int
    """Pixels per latent element along one side (the downsampling factor)."""
    overlap: Overlap = dataclasses.field(default=0, metadata={"json": "lap"})
    """Pixels by which each patch extends into its neighbours on every side, 0 to `patch`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiteConfig:
    """Configures a linear patch path plus a residual network that has a finite receptive field."""

    kind: ClassVar[str] = "lite"
    patch: int
    """Pixels per latent element along one side: `stem` doubled once for each resolution after the first."""
    stem: int
    """Space-to-depth factor before the first convolution, at least 2."""
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
    """Configures the AutoencoderKL topology of latent diffusion (Rombach et al. 2022)."""

    kind: ClassVar[str] = "conv"
    widths: tuple[int, ...]
    """Channels of each resolution, finest first (`block_out_channels`)."""
    layers_per_block: int
    """Residual blocks of each resolution in the encoder; the decoder has one more."""
    groups: int
    """Groups of GroupNorm; must divide every width."""
    mid_attention: bool
    """Self-attention at the coarsest resolution."""
    quant_conv: bool
    """1x1 convolution behind the encoder."""
    post_quant_conv: bool
    """1x1 convolution before the decoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Configures fully connected networks, to which a square of `side` pixels is one vector with one latent vector."""

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
    """Configures the posterior of a VAE: a normal distribution with independent elements."""

    kind: ClassVar[str] = "gaussian"
    logvar_min: float
    """Lower clamp of the log-variance."""
    logvar_max: float
    """Upper clamp of the log-variance."""
    logvar_channels: int | None = None
    """Number of first channels whose log-variance the encoder predicts at each position; the others have a trained
    number each, as the noise of weak channels is the same everywhere. None: all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityConfig:
    """Configures a deterministic autoencoder, whose latents are the encoder's output."""

    kind: ClassVar[str] = "identity"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig:
    """Configures the nearest vector of a learned codebook at each position (van den Oord et al. 2017)."""

    kind: ClassVar[str] = "vq"
    codes: int
    """Vectors in the codebook, 2 to 16,384."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiniteScalarConfig:
    """Configures the rounding of every channel to one of a few levels (Mentzer et al. 2024)."""

    kind: ClassVar[str] = "fsq"
    levels: tuple[int, ...]
    """Levels of each latent channel, at least 2; their product is the size of the implied codebook."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """Configures a normal density over pixels in [-1, 1]."""

    kind: ClassVar[str] = "gaussian"
    scale: Literal["fixed", "learned", "per_pixel"]
    """`fixed`: sigma is a constant; `learned`: one trained scalar; `per_pixel`: the decoder predicts it."""
    sigma: float
    """Standard deviation in units of [-1, 1] pixels: the constant, or the starting point."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscretizedLogisticConfig:
    """Configures probabilities of the 256 pixel values: logistics integrated over each value's bin."""

    kind: ClassVar[str] = "discretized_logistic"
    components: int
    """1 for a single logistic (Kingma et al. 2016); more for a mixture (Salimans et al. 2017)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BernoulliConfig:
    """Configures probabilities of binary pixels {0, 1}."""

    kind: ClassVar[str] = "bernoulli"
    pixels: Literal["threshold", "drawn"] = "threshold"
    """Makes uint8 pixels v binary. `threshold`: 1 from 128 up. `drawn`: 1 with probability v / 255, drawn anew each
    time that training sees an image, and once for all in evaluation (Burda et al. 2016). Encoding files always
    uses the threshold."""


BackboneConfig = LinearConfig | LiteConfig | ConvConfig | MLPConfig
BottleneckConfig = DiagonalGaussianConfig | IdentityConfig | VectorQuantizerConfig | FiniteScalarConfig
LikelihoodConfig = GaussianConfig | DiscretizedLogisticConfig | BernoulliConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Describe a model: this gives its tensors their meaning."""

    image_channels: int
    """1 for grey images, 3 for RGB."""
    latent_channels: int
    """Channels of the latents."""
    backbone: BackboneConfig
    bottleneck: BottleneckConfig
    likelihood: LikelihoodConfig
    classes: tuple[str, ...] = ()
    """Names of the classes (folders of images) of a conditional model; none for an unconditional model."""
    prefixes: tuple[int, ...] = ()
    """Numbers of first channels that are latents of their own, rising to `latent_channels`; the decoder takes zeros for
    the channels that a prefix lacks. Empty: the decoder needs all channels."""

    @property
    def codes(self) -> int | None:
        """Return the size of the codebook, None without one; coded latents are integers from 0 below this."""
        match self.bottleneck:
            case VectorQuantizerConfig(codes=codes):
                return codes
            case FiniteScalarConfig(levels=levels):
                return math.prod(levels)
            case _:
                return None

    @property
    def coded_channels(self) -> int:
        """Return the number of integers that a bitstream holds at each position of the latents."""
        return self.latent_channels if self.codes is None else 1
