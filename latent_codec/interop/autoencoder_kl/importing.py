"""Import an AutoencoderKL folder, or one safetensors file in either layout, as a codec."""

import base64
import binascii
import logging
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl import layouts, settings
from latent_codec.interop.autoencoder_kl.exporting import (
    BACKBONE,
    CONFIG,
    FORMAT_VERSION,
    KEY,
    WEIGHTS,
    digest,
    restored,
)
from latent_codec.interop.autoencoder_kl.folding import Tensors
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig
from latent_codec.model.file import LatentStatistics, check_destination
from latent_codec.storage.files import make_folder, open_regular, sha256_of
from latent_codec.storage.json_config import from_json, loads
from latent_codec.storage.tensors import check_claim, check_finite, check_numbers, open_tensors, shapes_of
from latent_codec.version import __version__

log = logging.getLogger(__name__)

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


class _Source(NamedTuple):
    weights: Path
    config: Path | None


def import_model(
    source: Path,
    destination: Path,
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    half: bool = False,
) -> Codec:
    """Write a model file from an AutoencoderKL folder or a safetensors file, and read it back.

    A file may be in diffusers' layout or the original one, alone or within a whole checkpoint; its configuration is
    inferred from its shapes, unless an AutoencoderKL's config.json lies beside it. The latent statistics follow from
    the scale in config.json or from the factors given here; without either there are none. An export of this program
    becomes the model that it was, with the same id. `half` stores float16. Raises `UserError` for pickles, for missing,
    extra, mis-shaped or non-finite tensors, for features that no codec has, and for a destination that is there and no
    model file.
    """
    found = _find(source)
    if destination.resolve() == found.weights.resolve():
        raise UserError(f"{destination}: is the file to import; give another name")
    check_destination(destination)
    tensors, metadata = _read(found.weights)
    codec = _restore(tensors, metadata, found.weights) if KEY in metadata else None
    if codec is None:
        config, scale = _describe(found, tensors)
        codec = _load(config, tensors, found.weights)
        codec.statistics = scale and settings.statistics_of(scale, config.latent_channels, source.name)
        codec.provenance = {
            "imported_from": source.name,
            "sha256": sha256_of(found.weights),
            "imported_by": f"latent_codec {__version__}",
        }
    if scaling_factor is not None or shift_factor is not None:
        codec.statistics = _given(scaling_factor, shift_factor, codec.config.latent_channels)
    make_folder(destination.parent)
    codec.save(destination, half=half)
    return Codec.load(destination)


def _given(scaling: float | None, shift: float | None, channels: int) -> LatentStatistics:
    scale = settings.PipelineScale(1.0 if scaling is None else scaling, shift or 0.0, None, None)
    if (statistics := settings.statistics_of(scale, channels, "the command line")) is None:
        raise UserError(
            f"--scaling-factor {scaling} --shift-factor {shift}: both must be finite, and the first above 0"
        )
    return statistics


def _find(source: Path) -> _Source:
    if source.is_dir():
        folder = source if (source / CONFIG).is_file() or not (source / "vae" / CONFIG).is_file() else source / "vae"
        if not (folder / CONFIG).is_file():
            raise UserError(f"{source}: no {CONFIG} in it; give an AutoencoderKL's folder, or one safetensors file")
        return _Source(_weights_in(folder), folder / CONFIG)
    if not source.exists():
        raise UserError(f"{source}: no such file or folder")
    beside = source.with_name(CONFIG)
    return _Source(source, beside if _is_autoencoder(beside) else None)


def _weights_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if (folder / WEIGHTS) in found:
        return folder / WEIGHTS
    if (folder / f"{WEIGHTS}.index.json").is_file():
        raise UserError(f"{folder}: its weights are in several shards; save them in one file (max_shard_size)")
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder}: no {WEIGHTS}, but {', '.join(p.name for p in found)}; name the file of these to import"
        )
    for path in sorted(folder.iterdir()):
        _refuse_pickle(path)
    raise UserError(f"{folder}: no {WEIGHTS} in it")


def _refuse_pickle(path: Path) -> None:
    """Raise `UserError` if a file that could not be read as safetensors looks like a pickle."""
    try:
        with open_regular(path) as file:
            start = file.read(4)
    except OSError:
        start = b""  # reading it will raise the error
    if path.suffix in _PICKLES or start[:1] == b"\x80" or start == b"PK\x03\x04":
        raise UserError(
            f"{path}: a pickle, which can run anything when it is loaded, is never read; convert it to safetensors "
            "with a tool that you trust with it (AutoencoderKL.save_pretrained writes safetensors)"
        )


def _is_autoencoder(config: Path) -> bool:
    try:
        return loads(config.read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKL"
    except (OSError, ValueError, AttributeError):
        return False


def _read(weights: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the autoencoder's tensors under today's names, float32 and finite, and the file's metadata."""
    try:
        with open_tensors(weights) as file:
            names = list(file.keys())
            prefix = layouts.prefix_of(names, str(weights))
            own = [n for n in names if n.startswith(prefix) and not layouts.is_training_state(n.removeprefix(prefix))]
            tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in own}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        _refuse_pickle(weights)
        raise UserError(f"{weights}: not a safetensors file ({error}); nothing is ever loaded from pickles") from error
    if odd := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise UserError(
            f"{weights}: tensor {odd[0]} is {tensors[odd[0]].dtype}; an autoencoder's are floating-point numbers"
        )
    tensors = {name: tensor.float() for name, tensor in layouts.canonical(tensors, str(weights)).items()}
    check_finite(tensors, weights)
    return tensors, metadata


def _describe(found: _Source, tensors: Tensors) -> tuple[CodecConfig, settings.PipelineScale | None]:
    """Return the configuration, from config.json or the shapes, and the scale if it is known."""
    if found.config is None:
        backbone, image_channels, latent_channels = layouts.infer_config(tensors, str(found.weights))
        return settings.codec_config(backbone, image_channels, latent_channels), None
    try:
        value = loads(found.config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{found.config}: cannot be read as JSON: {error}") from error
    return settings.from_json(value, str(found.config))


def _load(config: CodecConfig, tensors: Tensors, where: Path) -> Codec:
    check_claim(config, lambda: Codec(config).backbone, shapes_of(tensors), where)
    codec = Codec(config)
    codec.load_state_dict({f"{BACKBONE}{name}": tensor for name, tensor in tensors.items()})
    return codec.eval()


def _restore(tensors: Tensors, metadata: dict[str, str], where: Path) -> Codec | None:
    """Return the model that was exported; None, with a warning, if the file was changed since."""
    try:
        header: dict[str, Any] = loads(metadata[KEY])
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {header['format_version']}; this program reads {FORMAT_VERSION}")
        config = from_json(CodecConfig, header["config"])
        original = {n: t.float() for n, t in load(base64.b64decode(header["original"], validate=True)).items()}
        if digest(config, tensors, original) != header["digest"]:
            raise ValueError("its tensors are not those that were exported")
        check_numbers(config, shapes_of(tensors | original), where)
        found = restored(config, tensors, original)
        check_claim(config, lambda: Codec(config), shapes_of(found), where)
        codec = Codec(config).eval()
        codec.load_state_dict(found)
        codec.statistics = from_json(LatentStatistics | None, header["statistics"], where="statistics")
        codec.provenance = from_json(dict, header["provenance"], where="provenance")
    except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error, SafetensorError) as error:
        log.warning("%s: imported as it stands, not as the model that was exported: %s", where, error)
        return None
    return codec
