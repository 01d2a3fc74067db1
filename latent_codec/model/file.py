"""Read and write model files: safetensors whose metadata key `latent_codec` holds the rest as JSON, and no pickle."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from latent_codec.errors import UserError
from latent_codec.model.config import CodecConfig
from latent_codec.model.parts import build
from latent_codec.prior.priors import PREFIX, Priors, PriorsHeader, from_tensors, to_header, to_tensors
from latent_codec.storage.json_config import dumps, from_json, to_json
from latent_codec.storage.removal import check_replaceable
from latent_codec.storage.tensors import (
    FORMAT_VERSION,
    KEY,
    check_claim,
    check_finite,
    content_id,
    open_tensors,
    read_header,
    save_tensors,
    stored_shapes,
)

_FIELDS = frozenset({"config", "statistics", "provenance"})
"""Fields of the header of a model file, and of no other file of this program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Holds the statistics of a model's latents over a set of images."""

    source: str
    """The set of images, in words."""
    images: int
    """Number of images."""
    mean: tuple[float, ...]
    """Mean of the posterior means over images and positions, per channel."""
    std: tuple[float, ...]
    """Standard deviation of a posterior sample, sqrt(var(mean) + E[posterior variance]), per channel."""
    posterior_std: tuple[float, ...] | None
    """sqrt(E[posterior variance]) per channel; None if the posterior has no variance, or if mean and std were given and
    not measured."""
    prefix_psnr: tuple[float, ...] = ()
    """PSNR in dB of the decoded mode with each of the model's prefixes, averaged over the images; empty without any."""

    def prefix(self, channels: int) -> "LatentStatistics":
        """Return the statistics of the first channels."""
        of_posterior = None if self.posterior_std is None else self.posterior_std[:channels]
        mean, std = self.mean[:channels], self.std[:channels]
        return dataclasses.replace(self, mean=mean, std=std, posterior_std=of_posterior, prefix_psnr=())

    def __post_init__(self) -> None:
        of_posterior = self.std if self.posterior_std is None else self.posterior_std
        if not len(self.mean) == len(self.std) == len(of_posterior):
            raise ValueError("mean, std and posterior_std must have one value for each channel")
        check_scale(self.mean, self.std + of_posterior)


def check_scale(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise `ValueError` unless latents can be scaled by these in float32: finite means, and positive deviations."""
    largest, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
    if not all(abs(value) <= largest for value in mean) or not all(least <= value <= largest for value in std):
        raise ValueError(f"mean {mean} must be finite as float32, and standard deviation {std} must be positive")


class ModelFile(NamedTuple):
    """Holds what a model file does."""

    config: CodecConfig
    tensors: dict[str, torch.Tensor]  # float32
    statistics: LatentStatistics | None
    provenance: dict[str, Any]
    priors: Priors | None

    @property
    def model_id(self) -> str:
        """Return the SHA-256 of config and tensors."""
        return model_id(self.config, self.tensors)


def model_id(config: CodecConfig, tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of config and tensors as 64 hex digits; values count, not the width they are stored in."""
    return content_id(to_json(config), tensors)


def check_destination(path: Path) -> None:
    """Raise `UserError` unless a model file may be written to a path: only another model file is replaced."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the model file's name, such as {path}.safetensors")
    check_replaceable(path, _is_model_file, "a model file")


def _is_model_file(path: Path) -> bool:
    try:
        return read_header(path).keys() >= _FIELDS
    except UserError:
        return False


def write(path: Path, model: ModelFile, *, half: bool = False) -> None:
    """Write a model file atomically, with float16 tensors if `half`.
    Raises `UserError` naming a tensor that is not finite or overflows float16, `OSError` if the disk refuses."""
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in model.tensors.items()}
    check_finite(tensors, path)
    if half:
        tensors = {name: t.half() for name, t in tensors.items()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{path}: tensor {name} exceeds float16's 65504; store float32, without --half")
    header = {
        "format_version": FORMAT_VERSION,
        "config": to_json(model.config),
        "statistics": to_json(model.statistics),
        "provenance": model.provenance,
    }
    if model.priors is not None:
        header["priors"] = to_json(to_header(model.priors))
        tensors |= to_tensors(model.priors)
    save_tensors(path, tensors, {KEY: dumps(header)})


def read(path: Path) -> ModelFile:
    """Read and check a model file.

    Raises `UserError` if it is missing, not safetensors, not ours, of another format version, or not finite.
    """
    header = read_header(path)
    try:
        config = from_json(CodecConfig, header["config"])
        statistics = from_json(LatentStatistics | None, header["statistics"], where="statistics")
        provenance = from_json(dict, header["provenance"], where="provenance")
        about = from_json(PriorsHeader | None, header.get("priors"), where="priors")
        if statistics is not None and len(statistics.mean) != config.latent_channels:
            raise ValueError(f"statistics are of {len(statistics.mean)} channels, latents of {config.latent_channels}")
        tensors, prior_tensors = _read_tensors(path, config)
        priors = None
        if about is not None:
            priors = from_tensors(about, prior_tensors, config.coded_channels, config.codes)
        elif prior_tensors:
            raise ValueError(f"the header does not know the priors of tensors {sorted(prior_tensors)[:5]}")
    except KeyError as error:
        raise UserError(f"{path}: damaged model header: {error} is missing") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: damaged or unknown model header: {error}") from error
    return ModelFile(config, tensors, statistics, provenance, priors)


def _read_tensors(path: Path, config: CodecConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Read the networks' tensors as float32, and those of the priors, once they are known to be what `config` needs."""
    shapes = stored_shapes(path, is_weight=lambda name: not name.startswith(PREFIX))
    own = {name: shape for name, shape in shapes.items() if not name.startswith(PREFIX)}
    check_claim(config, lambda: nn.ModuleDict(build(config)._asdict()), own, path)
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name).float() for name in own}
        check_finite(tensors, path)
        return tensors, {name: file.get_tensor(name) for name in shapes if name.startswith(PREFIX)}
