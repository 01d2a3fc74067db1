"""Model files: safetensors with one metadata key, `latent_codec`, that says everything else. No pickle anywhere."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from latent_codec.errors import UserError
from latent_codec.model.config import CodecConfig
from latent_codec.prior.priors import PREFIX, Priors, PriorsHeader, from_tensors, to_header, to_tensors
from latent_codec.storage.json_config import dumps, from_json, to_json
from latent_codec.storage.tensors import FORMAT_VERSION, KEY, check_finite, content_id, read_header, save_tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """What a model's latents look like over a stated set of images."""

    source: str
    """The set, in words."""
    images: int
    mean: tuple[float, ...]
    """Per channel, of the posterior means over images and positions."""
    std: tuple[float, ...]
    """Per channel, of one posterior sample: sqrt(var(mean) + E[var])."""
    posterior_std: tuple[float, ...] | None
    """Per channel, sqrt(E[posterior variance]); None if the posterior has none, or if the set was never seen, only its
    mean and std were told."""

    def __post_init__(self) -> None:
        of_posterior = self.std if self.posterior_std is None else self.posterior_std
        if not len(self.mean) == len(self.std) == len(of_posterior):
            raise ValueError("mean, std and posterior_std must have one value per channel each")
        if not all(value > 0 for value in self.std + of_posterior):
            raise ValueError(f"std {self.std} and posterior_std {self.posterior_std} must be positive")


class ModelFile(NamedTuple):
    config: CodecConfig
    tensors: dict[str, torch.Tensor]  # float32
    statistics: LatentStatistics | None
    provenance: dict[str, Any]
    priors: Priors | None


def model_id(config: CodecConfig, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over config and tensors, 64 hex digits. Values count, not the width they are stored in."""
    return content_id(to_json(config), tensors)


def write(path: Path, model: ModelFile, *, half: bool = False) -> None:
    """Write a model file atomically; `half` stores float16.

    Raises `UserError` naming a tensor that is not finite or overflows float16, `OSError` if the disk refuses.
    """
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

    Raises `UserError` if it is missing, not safetensors, not ours, of a newer format, or holds non-finite values.
    """
    header, tensors, of_priors = read_header(path), {}, {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            if name.startswith(PREFIX):
                of_priors[name] = file.get_tensor(name)
            else:
                tensors[name] = file.get_tensor(name).float()
    check_finite(tensors, path)
    try:
        config = from_json(CodecConfig, header["config"])
        statistics = from_json(LatentStatistics | None, header["statistics"], where="statistics")
        provenance = from_json(dict, header["provenance"], where="provenance")
        if statistics is not None and len(statistics.mean) != config.latent_channels:
            raise ValueError(f"statistics of {len(statistics.mean)} channels, latents of {config.latent_channels}")
        priors = None
        if (about := from_json(PriorsHeader | None, header.get("priors"), where="priors")) is not None:
            priors = from_tensors(about, of_priors, config.coded_channels, config.codes)
        elif of_priors:
            raise ValueError(f"tensors {sorted(of_priors)[:5]} of priors that the header does not know")
    except KeyError as error:
        raise UserError(f"{path}: damaged model header: {error} is missing") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged or unknown model header: {error}") from error
    return ModelFile(config, tensors, statistics, provenance, priors)
