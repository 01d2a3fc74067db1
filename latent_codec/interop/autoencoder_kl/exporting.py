"""Export a codec as an AutoencoderKL folder that diffusers' pipelines load."""

import base64
import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl import activations, settings
from latent_codec.interop.autoencoder_kl.folding import Tensors, fold
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig, DiagonalGaussianConfig
from latent_codec.model.file import LatentStatistics, model_id
from latent_codec.model.networks.backbone import BackboneShape
from latent_codec.model.networks.conv import ConvBackbone
from latent_codec.storage.files import atomic_folder, write_text
from latent_codec.storage.json_config import dumps, to_json
from latent_codec.storage.tensors import check_state, open_tensors, save_tensors

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "latent_codec_export"
"""Key of the weights' metadata that hold what AutoencoderKL cannot represent of the exported model."""
FORMAT_VERSION = 1
BACKBONE = "backbone."
"""Prefix of a codec's tensor names before AutoencoderKL's."""

_CONVOLUTIONS = tuple(f"{a}quant_conv.{b}" for a in ("", "post_") for b in ("weight", "bias"))


class Float16Check(NamedTuple):
    """Report what running an export on images has shown."""

    images: int
    peak: float
    """Largest magnitude of any module's output, in float32."""
    clamped: float
    """Share of log-variances that diffusers clamps to other values than the codec does."""

    @property
    def force_upcast(self) -> bool:
        """True if float16 is too small."""
        return activations.overflows(self.peak)

    def __str__(self) -> str:
        text = (
            f"activations reach {self.peak:.4g} on {self.images} images, so "
            f"{'pipelines run it in float32' if self.force_upcast else 'float16 holds them'} "
            f"(force_upcast {str(self.force_upcast).lower()})"
        )
        if self.clamped > 0:
            text += (
                f"; diffusers clamps {100 * self.clamped:.3g}% of the log-variances otherwise "
                f"(to {settings.LOGVAR_RANGE}), so the posterior's noise differs there"
            )
        return text


class _Parts(NamedTuple):
    """Hold an AutoencoderKL, and the codec's tensors, by their own names, that it lacks or has changed."""

    backbone: ConvConfig
    tensors: Tensors
    original: Tensors


def export_folder(
    codec: Codec,
    folder: Path,
    *,
    images: Iterable[torch.Tensor] = (),
    normalize: bool = True,
    half: bool = False,
    probe_side: int = activations.PROBE_SIDE,
) -> Float16Check:
    """Write config.json and weights that `AutoencoderKL.from_pretrained(folder)` loads, both or neither.

    With `normalize` the written model's latents are normalised by the codec's statistics (`folding.fold`), so that
    scaling factor 1 and shift 0 are right in any pipeline; without, its latents are the codec's and the factors are
    computed from the statistics. `force_upcast` is measured on made-up images of `probe_side` pixels a side and on
    `images`, (1, c, h, w) uint8 with sides that are multiples of the factor. `half` stores float16. An earlier export
    is replaced. Raises `UserError` for a model that AutoencoderKL cannot represent or that has no statistics, and for a
    folder that holds anything else.
    """
    check_folder(folder)
    settings.check_exportable(codec.config)
    if (statistics := codec.statistics) is None:
        raise UserError(
            f"{folder}: the model has no latent statistics to normalise by; name images to measure them on with --data"
        )
    parts = _parts(codec, statistics if normalize else None)
    made_up = activations.made_up_images(codec.config.image_channels, codec.factor, probe_side)
    measured = _measure(codec, parts, statistics if normalize else None, itertools.chain(made_up, images))
    width = torch.float16 if half else torch.float32
    parts = _Parts(parts.backbone, *({n: t.to(width).contiguous() for n, t in p.items()} for p in parts[1:]))
    _check_values(parts, folder)
    header = {
        "format_version": FORMAT_VERSION,
        "config": to_json(codec.config),
        "statistics": to_json(statistics),
        "provenance": codec.provenance,
        "model_id": model_id(codec.config, restored(codec.config, parts.tensors, parts.original)),
        "digest": digest(codec.config, parts.tensors, parts.original),
        "original": base64.b64encode(save(parts.original)).decode(),
        "measured": measured._asdict(),
    }
    scale = settings.NORMALIZED if normalize else settings.scale_of(statistics)
    check_folder(folder)  # again: measuring took a while
    config = dataclasses.replace(codec.config, backbone=parts.backbone)
    text = settings.to_json(config, scale, force_upcast=measured.force_upcast)
    with atomic_folder(folder) as temporary:
        save_tensors(temporary / WEIGHTS, parts.tensors, {"format": "pt", KEY: dumps(header)})
        write_text(temporary / CONFIG, json.dumps(text, indent=2) + "\n")
    return measured


def restored(config: CodecConfig, tensors: Tensors, original: Tensors) -> Tensors:
    """Return a codec's state from an export's tensors; raises `KeyError` for a tensor that is in neither."""
    with torch.device("meta"):
        names = Codec(config).state_dict()
    return {name: original[name] if name in original else tensors[name.removeprefix(BACKBONE)] for name in names}


def digest(config: CodecConfig, tensors: Tensors, original: Tensors) -> str:
    """Return a digest by which an import recognises that the tensors are still those that were exported."""
    return model_id(config, tensors | original)


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless the folder is new, empty, or an earlier export."""
    if folder.is_dir() and (names := {path.name for path in folder.iterdir()}):
        if names != {CONFIG, WEIGHTS} or not _is_ours(folder / WEIGHTS):
            raise UserError(f"{folder}: holds files that are no export of latent-codec; give a new folder")
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; an AutoencoderKL is a folder")


def _is_ours(weights: Path) -> bool:
    try:
        with open_tensors(weights) as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _parts(codec: Codec, statistics: LatentStatistics | None) -> _Parts:
    """Split a codec into an AutoencoderKL, normalised by the statistics if given, and what that lacks."""
    backbone, channels = settings.check_exportable(codec.config), codec.config.image_channels
    state = {name: tensor.detach().cpu().float() for name, tensor in codec.state_dict().items()}
    tensors = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
    replaced = {f"{BACKBONE}{name}" for name in _CONVOLUTIONS} if statistics is not None else set()
    if codec.likelihood.params_per_channel > 1:  # the mean comes first, and AutoencoderKL has only that
        for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            tensors[name] = tensors[name][:channels]
            replaced.add(f"{BACKBONE}{name}")
    with torch.device("meta"):
        expected = _network(backbone, codec.config).state_dict()
    check_state(expected, tensors, "as an AutoencoderKL")
    original = {n: t for n, t in state.items() if n in replaced or not n.startswith(BACKBONE)}
    if statistics is not None:
        tensors, backbone = fold(tensors, backbone, statistics)
    return _Parts(backbone, tensors, original)


def _network(backbone: ConvConfig, config: CodecConfig) -> ConvBackbone:
    shape = BackboneShape(
        image_channels=config.image_channels,
        latent_channels=config.latent_channels,
        features=2 * config.latent_channels,
        params=config.image_channels,
    )
    return ConvBackbone(backbone, shape)


def _check_values(parts: _Parts, folder: Path) -> None:
    for name, tensor in (parts.tensors | parts.original).items():
        if not bool(torch.isfinite(tensor).all()):
            limit = "exceeds float16's 65504; leave out --half" if tensor.dtype == torch.float16 else "is not finite"
            raise UserError(f"{folder}: tensor {name} {limit}")


@torch.inference_mode()
def _measure(
    codec: Codec, parts: _Parts, statistics: LatentStatistics | None, images: Iterable[torch.Tensor]
) -> Float16Check:
    """Encode images with the exported network and decode a draw from the posterior."""
    config, device = codec.config, next(codec.parameters()).device
    network = _network(parts.backbone, config)
    network.load_state_dict(parts.tensors)
    network = network.eval().to(device)
    assert isinstance(config.bottleneck, DiagonalGaussianConfig)
    low, high = config.bottleneck.logvar_min, config.bottleneck.logvar_max
    std = torch.ones(config.latent_channels) if statistics is None else torch.tensor(statistics.std)
    folded = 2 * std.log().to(device)[:, None, None]  # what the folding subtracted from the log-variances
    count, clamped = 0, 0.0
    with activations.watched(network) as peak:
        chosen = activations.middles(images, network.factor)
        for pixels in tqdm(chosen, "float16's range", unit="image", disable=None):
            x = codec.likelihood.from_uint8(pixels.to(device))
            mean, logvar = network.encode(x).float().chunk(2, dim=1)
            theirs = logvar.clamp(*settings.LOGVAR_RANGE)
            ours = (logvar + folded).clamp(low, high) - folded
            clamped += ((ours - theirs).abs() > 1e-3).float().mean().item()
            network.decode(mean + torch.exp(0.5 * theirs) * activations.standard_noise(mean))
            count += 1
    return Float16Check(count, peak.value, clamped / count)
