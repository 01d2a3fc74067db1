"""Convert AutoencoderKL's config.json to a codec's configuration, its scale to latent statistics, and both back."""

import logging
import math
from typing import Any, NamedTuple

from latent_codec.errors import UserError
from latent_codec.model.config import BackboneConfig, CodecConfig, ConvConfig, DiagonalGaussianConfig, GaussianConfig
from latent_codec.model.file import LatentStatistics

log = logging.getLogger(__name__)

LOGVAR_RANGE = (-30.0, 20.0)
"""Range that diffusers clamps log-variances to."""
SIGMA = 0.1
"""Standard deviation of an imported model's likelihood for pixels in [-1, 1]; its files name none. A learned sigma
settles there for a reconstruction of 26 dB (sigma = 2 * 10^(-PSNR / 20)); decoding does not depend on it."""

_ADAPTER = "latent_codec.interop.autoencoder_kl.adapter.CodecAutoencoder"
_WRITTEN_FOR = "0.35.0"  # the first diffusers whose AutoencoderKL has every setting written here
_TILE = 512  # pixels: side of diffusers' tiles, where tiling is enabled
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_DEFAULTS: dict[str, Any] = {  # diffusers' values of settings that a config.json leaves out
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_DOWN],
    "up_block_types": [_UP],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


class PipelineScale(NamedTuple):
    """Hold the numbers by which pipelines normalise latents: SD1.x computes z * scaling; SD3 and FLUX (z - shift) *
    scaling; SDXL, if it finds mean and std, (z - mean) * scaling / std for each channel."""

    scaling_factor: float
    shift_factor: float
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None


NORMALIZED = PipelineScale(1.0, 0.0, None, None)
"""Scale of latents that have mean 0 and standard deviation 1 already."""


def scale_of(statistics: LatentStatistics) -> PipelineScale:
    """Return one factor over all channels, as Rombach et al. (2022, section G) do, and numbers per channel for latents
    of 4 channels, the only ones to which SDXL's pipelines apply them."""
    mean, std = statistics.mean, statistics.std
    shift = math.fsum(mean) / len(mean)
    variance = math.fsum(s * s + (m - shift) ** 2 for m, s in zip(mean, std, strict=True)) / len(mean)
    scaling = _short(1 / math.sqrt(variance))
    if len(mean) != 4 or (len(set(mean)) == 1 and len(set(std)) == 1):
        return PipelineScale(scaling, _short(shift), None, None)
    return PipelineScale(scaling, _short(shift), tuple(map(_short, mean)), tuple(_short(s * scaling) for s in std))


def statistics_of(scale: PipelineScale, channels: int, source: str) -> LatentStatistics | None:
    """Return the statistics that a scale stands for; None, with a warning, if its numbers cannot be any."""
    scaling, shift = scale.scaling_factor, scale.shift_factor
    mean, std = scale.latents_mean or (shift,) * channels, scale.latents_std or (1.0,) * channels
    values = (scaling, *mean, *std)
    if not (all(map(math.isfinite, values)) and min(scaling, *std) > 0 and len(mean) == len(std) == channels):
        log.warning("%s: %s cannot normalise %d channels; the model has no latent statistics", source, scale, channels)
        return None
    std = tuple(_short(s / scaling) for s in std)
    return LatentStatistics(source=f"the scale of {source}", images=0, mean=mean, std=std, posterior_std=None)


def _short(value: float) -> float:
    """Round to 10 digits: more than float32 has, and few enough that the inverse of an inverse is exact."""
    return float(f"{value:.10g}")


def codec_config(backbone: ConvConfig, image_channels: int, latent_channels: int) -> CodecConfig:
    """Return the configuration of the codec that an AutoencoderKL is."""
    return CodecConfig(
        image_channels=image_channels,
        latent_channels=latent_channels,
        backbone=backbone,
        bottleneck=DiagonalGaussianConfig(logvar_min=LOGVAR_RANGE[0], logvar_max=LOGVAR_RANGE[1]),
        likelihood=GaussianConfig(scale="fixed", sigma=SIGMA),
    )


def check_exportable(config: CodecConfig) -> ConvConfig:
    """Return the backbone's configuration; raises `UserError` for a codec that AutoencoderKL cannot represent."""
    backbone: BackboneConfig = config.backbone
    if not isinstance(backbone, ConvConfig):
        raise UserError(f"a {backbone.kind} backbone is no AutoencoderKL, only conv is; in a pipeline use {_ADAPTER}")
    if config.classes:
        raise UserError(f"AutoencoderKL takes no class, and this model needs one of {len(config.classes)}")
    if config.bottleneck.kind != "gaussian":
        raise UserError(f"AutoencoderKL has a diagonal Gaussian posterior, not a {config.bottleneck.kind} bottleneck")
    assert isinstance(config.bottleneck, DiagonalGaussianConfig)
    if (n := config.bottleneck.logvar_channels) is not None:
        raise UserError(f"AutoencoderKL predicts all log-variances, this model {n}; in a pipeline use {_ADAPTER}")
    if config.likelihood.kind != "gaussian":
        raise UserError(
            f"the mean of a {config.likelihood.kind} likelihood is computed from the decoder's output, and "
            f"AutoencoderKL returns the output itself; in a pipeline use {_ADAPTER}"
        )
    return backbone


def to_json(config: CodecConfig, scale: PipelineScale, *, force_upcast: bool) -> dict[str, Any]:
    """Return the config.json of a codec that passes `check_exportable`."""
    backbone = check_exportable(config)
    stages = len(backbone.widths)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _WRITTEN_FOR,
        "act_fn": "silu",
        "block_out_channels": list(backbone.widths),
        "down_block_types": [_DOWN] * stages,
        "force_upcast": force_upcast,
        "in_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "latents_mean": scale.latents_mean and list(scale.latents_mean),
        "latents_std": scale.latents_std and list(scale.latents_std),
        "layers_per_block": backbone.layers_per_block,
        "mid_block_add_attention": backbone.mid_attention,
        "norm_num_groups": backbone.groups,
        "out_channels": config.image_channels,
        "sample_size": _TILE,
        "scaling_factor": scale.scaling_factor,
        "shift_factor": scale.shift_factor,
        "up_block_types": [_UP] * stages,
        "use_post_quant_conv": backbone.post_quant_conv,
        "use_quant_conv": backbone.quant_conv,
    }


def from_json(value: Any, where: str) -> tuple[CodecConfig, PipelineScale]:
    """Parse a config.json; raises `UserError` naming a feature that no codec has, or a damaged value."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: not the configuration of a model; expected an object, found {value!r}")
    if (name := value.get("_class_name")) != "AutoencoderKL":
        raise UserError(f"{where}: describes a {name}; only AutoencoderKL can be imported")
    if unknown := sorted(k for k in value if k not in _DEFAULTS and not k.startswith("_")):
        log.warning("%s: settings %s are unknown and ignored, as diffusers ignores them", where, ", ".join(unknown))
    given = {key: default if value.get(key) is None else value[key] for key, default in _DEFAULTS.items()}
    _check_features(given, where)
    try:
        backbone = ConvConfig(
            widths=tuple(map(_count, given["block_out_channels"])),
            layers_per_block=_count(given["layers_per_block"]),
            groups=_count(given["norm_num_groups"]),
            mid_attention=bool(given["mid_block_add_attention"]),
            quant_conv=bool(given["use_quant_conv"]),
            post_quant_conv=bool(given["use_post_quant_conv"]),
        )
        scale = PipelineScale(
            float(given["scaling_factor"]),
            float(given["shift_factor"] or 0.0),
            given["latents_mean"] and tuple(map(float, given["latents_mean"])),
            given["latents_std"] and tuple(map(float, given["latents_std"])),
        )
        return codec_config(backbone, _count(given["in_channels"]), _count(given["latent_channels"])), scale
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: damaged configuration: {error}") from error


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a positive integer, found {value!r}")
    return value


def _check_features(given: dict[str, Any], where: str) -> None:
    lacking = []
    for key, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        kinds = given[key] if isinstance(given[key], list) else [given[key]]
        lacking += [f"{kind} blocks" for kind in kinds if kind != known]
    if str(given["act_fn"]).lower() not in ("silu", "swish"):
        lacking.append(f"the activation {given['act_fn']}")
    if given["in_channels"] != given["out_channels"]:
        lacking.append(f"{given['in_channels']} channels in and {given['out_channels']} out")
    if lacking:
        raise UserError(
            f"{where}: this AutoencoderKL has features that no codec has: {', '.join(dict.fromkeys(lacking))}"
        )
