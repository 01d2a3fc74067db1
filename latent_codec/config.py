"""A model's configuration: frozen dataclasses that travel as JSON inside the model file. Free of torch."""

import dataclasses
import functools
import json
import math
import sys
import types
import typing
from typing import Any, ClassVar, Literal, Union


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """PCA's shape: one strided convolution in, its transpose out."""

    kind: ClassVar[str] = "linear"
    patch: int
    """Pixels per latent element along one side (the downsampling factor)."""
    lap: int = 0
    """Pixels that a patch reaches beyond its own on each side, 0 to `patch`."""


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
    lap: int = 0
    """Pixels that a patch of the linear path reaches beyond its own on each side, 0 to `patch`."""


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


def to_json(config: Any) -> Any:
    """A config as plain JSON values; a class that has a `kind` carries it.

    An integer in a float field becomes that float, so that equal configs give equal JSON (a model's identity). A field
    with a default is one that older files lack: at its default it is left out, so that their identity stays.
    """
    return _to_json(config, Any)


def _to_json(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _type_hints(type(value))
        written = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
        fields = {f.name: _to_json(getattr(value, f.name), hints[f.name]) for f in written}
        return _kind(type(value)) | fields
    if isinstance(value, (tuple, list)):
        item = (*typing.get_args(hint), Any)[0]
        return [_to_json(v, item) for v in value]
    if isinstance(value, int) and not isinstance(value, bool) and float in (hint, *typing.get_args(hint)):
        return float(value)
    return value


def _kind(cls: Any) -> dict[str, str]:
    return {"kind": cls.kind} if hasattr(cls, "kind") else {}


def from_json(cls: Any, value: Any, *, where: str = "config") -> Any:
    """The inverse of `to_json`.

    Strict: an unknown field, a missing one that has no default, an unknown kind or a value of the wrong type raises
    `ValueError` naming it.
    """
    if dataclasses.is_dataclass(cls):
        return _dataclass_from_json(cls, value, where)
    origin = typing.get_origin(cls)
    if origin in (Union, types.UnionType):
        return _union_from_json(typing.get_args(cls), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: expected a list, found {value!r}")
        item = typing.get_args(cls)[0]
        return tuple(from_json(item, v, where=f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        if value not in typing.get_args(cls):
            raise ValueError(f"{where}: {value!r} is none of {list(typing.get_args(cls))}")
        return value
    if cls is float and type(value) in (int, float):
        if not abs(value) <= sys.float_info.max:  # also true of NaN
            raise ValueError(f"{where}: expected a finite number, found {value!r}")
        return float(value)
    if not isinstance(value, cls) or (isinstance(value, bool) and cls is not bool):
        raise ValueError(f"{where}: expected {cls.__name__}, found {value!r}")
    return value


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _dataclass_from_json(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {value!r}")
    kind, hints = _kind(cls), _type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    if unknown := sorted(set(value) - {*names, *kind}):
        raise ValueError(f"{where}: unknown fields {unknown}; this version knows {names}")
    if missing := sorted({*needed, *kind} - set(value)):
        raise ValueError(f"{where}: missing fields {missing}")
    if kind and value["kind"] != kind["kind"]:
        raise ValueError(f"{where}: kind {value['kind']!r} is not {kind['kind']!r}")
    return cls(
        **{name: from_json(hints[name], value[name], where=f"{where}.{name}") for name in names if name in value}
    )


def _union_from_json(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in members:
        return None
    kinds = {kind: m for m in members for kind in _kind(m).values()}
    if not kinds:
        (member,) = [m for m in members if m is not type(None)]
        return from_json(member, value, where=where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected an object, found {value!r}")
    if (found := value.get("kind")) not in list(kinds):  # a list, because `found` may be unhashable
        raise ValueError(f"{where}: kind {found!r} is none of {sorted(kinds)}")
    return from_json(kinds[found], value, where=where)


def dumps(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, no NaN. Equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
