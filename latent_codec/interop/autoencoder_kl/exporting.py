"""A codec as an AutoencoderKL folder that pipelines of diffusers load."""

import base64
import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl import activations, settings
from latent_codec.interop.autoencoder_kl.folding import Tensors, fold
from latent_codec.model import file as model_file
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig, DiagonalGaussianConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.model.networks.backbone import BackboneShape
from latent_codec.model.networks.conv import ConvBackbone
from latent_codec.storage import tensors as tensor_files
from latent_codec.storage.files import atomic_folder, write_text
from latent_codec.storage.json_config import dumps, to_json

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEY = "latent_codec_export"
"""Of the weights' metadata: what AutoencoderKL cannot hold of the model that was exported."""
FORMAT_VERSION = 1
BACKBONE = "backbone."
"""A codec's tensors have this before the names that AutoencoderKL gives them."""

_CONVOLUTIONS = tuple(f"{a}quant_conv.{b}" for a in ("", "post_") for b in ("weight", "bias"))


class Measured(NamedTuple):
    """What an export was found to be on images."""

    images: int
    peak: float
    """The largest magnitude of any module's output, in float32."""
    clamped: float
    """Share of log-variances that diffusers clamps otherwise than the codec does."""

    @property
    def force_upcast(self) -> bool:
        """Whether float16 would be too small."""
        return activations.overflows(self.peak)

    def __str__(self) -> str:
        text = (
            f"activations reach {self.peak:.4g} on {self.images} images, so "
            f"{'pipelines run it in float32' if self.force_upcast else 'float16 holds them'} "
            f"(force_upcast {str(self.force_upcast).lower()})"
        )
        if self.clamped > 0:
            text += (
                f"; {100 * self.clamped:.3g}% of the log-variances are clamped otherwise by diffusers "
                f"(to {settings.LOGVAR_RANGE}), where the posterior's noise differs"
            )
        return text


class _Parts(NamedTuple):
    """An AutoencoderKL, and those tensors of the codec, by its own names, that are not in it as they were."""

    backbone: ConvConfig
    tensors: Tensors
    original: Tensors


def export_folder(
    codec: Codec, folder: Path, *, images: Iterable[torch.Tensor] = (), normalize: bool = True, half: bool = False
) -> Measured:
    """Write config.json and weights that `AutoencoderKL.from_pretrained(folder)` loads; both are there or neither.

    With `normalize` the latents of what is written are the codec's, normalised by its statistics (`folding.fold`), and
    scaling factor 1 and shift 0 hold in any pipeline; else they are the codec's, and the factors are the statistics'.
    `force_upcast` is measured on `images`, (1, c, h, w) uint8 with sides that are multiples of the factor, and on
    made-up ones. `half` stores float16. A folder of an earlier export is replaced. Raises `UserError` for a model that
    AutoencoderKL cannot be, or that has no statistics, and for a folder that holds anything else.
    """
    check_folder(folder)
    settings.check_exportable(codec.config)
    if (statistics := codec.statistics) is None:
        raise UserError(
            f"{folder}: the model has no latent statistics to normalise by; name images to measure them on with --data"
        )
    parts = _parts(codec, statistics if normalize else None)
    measured = _measure(codec, parts, statistics if normalize else None, images)
    width = torch.float16 if half else torch.float32
    parts = _Parts(parts.backbone, *({n: t.to(width).contiguous() for n, t in p.items()} for p in parts[1:]))
    _check_values(parts, folder)
    header = {
        "format_version": FORMAT_VERSION,
        "config": to_json(codec.config),
        "statistics": to_json(statistics),
        "provenance": codec.provenance,
        "model_id": model_file.model_id(codec.config, restored(codec.config, parts.tensors, parts.original)),
        "digest": digest(codec.config, parts.tensors, parts.original),
        "original": base64.b64encode(save(parts.original)).decode(),
        "measured": measured._asdict(),
    }
    scale = settings.NORMALIZED if normalize else settings.scale_of(statistics)
    config = dataclasses.replace(codec.config, backbone=parts.backbone)
    text = settings.to_json(config, scale, force_upcast=measured.force_upcast)
    with atomic_folder(folder) as temporary:
        tensor_files.save_tensors(temporary / WEIGHTS, parts.tensors, {"format": "pt", KEY: dumps(header)})
        write_text(temporary / CONFIG, json.dumps(text, indent=2) + "\n")
    return measured


def restored(config: CodecConfig, tensors: Tensors, original: Tensors) -> Tensors:
    """The state of a codec from an export's tensors; raises `KeyError` for one that is in neither."""
    with torch.device("meta"):
        names = Codec(config).state_dict()
    return {name: original[name] if name in original else tensors[name.removeprefix(BACKBONE)] for name in names}


def digest(config: CodecConfig, tensors: Tensors, original: Tensors) -> str:
    """Tells whether a file's tensors are still those that were exported."""
    return model_file.model_id(config, tensors | original)


def check_folder(folder: Path) -> None:
    """Raise `UserError` unless the folder is new, empty, or an export of ours."""
    if folder.is_dir() and (names := {path.name for path in folder.iterdir()}):
        if names != {CONFIG, WEIGHTS} or not _is_ours(folder / WEIGHTS):
            raise UserError(f"{folder}: holds files that are no export of latent-codec; give a new folder")
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; an AutoencoderKL is a folder")


def _is_ours(weights: Path) -> bool:
    try:
        with safe_open(weights, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _parts(codec: Codec, statistics: LatentStatistics | None) -> _Parts:
    """The codec as an AutoencoderKL, its latents normalised if there are statistics."""
    backbone, channels = settings.check_exportable(codec.config), codec.config.image_channels
    state = {name: tensor.detach().cpu().float() for name, tensor in codec.state_dict().items()}
    tensors = {n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)}
    replaced = {f"{BACKBONE}{name}" for name in _CONVOLUTIONS} if statistics is not None else set()
    if codec.likelihood.params_per_channel > 1:  # the mean comes first, and AutoencoderKL has nothing else
        for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
            tensors[name] = tensors[name][:channels]
            replaced.add(f"{BACKBONE}{name}")
    with torch.device("meta"):
        expected = _network(backbone, codec.config).state_dict()
    tensor_files.check_state(expected, tensors, "as an AutoencoderKL")
    original = {n: t for n, t in state.items() if n in replaced or not n.startswith(BACKBONE)}
    if statistics is not None:
        tensors, backbone = fold(tensors, backbone, statistics)
    return _Parts(backbone, tensors, original)


def _network(backbone: ConvConfig, config: CodecConfig) -> ConvBackbone:
    shape = BackboneShape(
        image_channels=config.image_channels,
        latent_channels=config.latent_channels,
        features_per_latent=2,
        params_per_channel=1,
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
) -> Measured:
    """Run what is exported on images, there and back from a draw of the posterior."""
    config, device = codec.config, next(codec.parameters()).device
    network = _network(parts.backbone, config)
    network.load_state_dict(parts.tensors)
    network = network.eval().to(device)
    assert isinstance(config.bottleneck, DiagonalGaussianConfig)
    low, high = config.bottleneck.logvar_min, config.bottleneck.logvar_max
    std = torch.ones(config.latent_channels) if statistics is None else torch.tensor(statistics.std)
    moved = 2 * std.log().to(device)[:, None, None]  # what the folding took from the log-variances
    made_up = activations.made_up_images(config.image_channels, network.factor)
    count, clamped = 0, 0.0
    with activations.watched(network) as peak:
        chosen = itertools.chain(made_up, activations.middles(images, network.factor))
        for pixels in tqdm(chosen, "float16's range", unit="image", disable=None):  # off where nobody looks
            x = codec.likelihood.from_uint8(pixels.to(device))
            mean, logvar = network.encode(x).float().chunk(2, dim=1)
            theirs = logvar.clamp(*settings.LOGVAR_RANGE)
            ours = (logvar + moved).clamp(low, high) - moved
            clamped += ((ours - theirs).abs() > 1e-3).float().mean().item()
            network.decode(mean + torch.exp(0.5 * theirs) * activations.standard_noise(mean))
            count += 1
    return Measured(count, peak.value, clamped / count)
