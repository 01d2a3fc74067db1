"""Read and write safetensors files with a JSON header under the key `latent_codec` of their metadata."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latent_codec.errors import UserError
from latent_codec.storage.files import put, temporary_folder, temporary_path
from latent_codec.storage.json_config import dumps, from_json

KEY = "latent_codec"
FORMAT_VERSION = 1


def content_id(config: Any, tensors: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a configuration's JSON and of tensors as float32, sorted by name: a model's id."""
    digest = hashlib.sha256(dumps(config).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().float().cpu().contiguous()
        digest.update(dumps([name, list(tensor.shape)]).encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically; raises `OSError`."""
    try:
        # safetensors writes a temporary file of its own beside the given one, and renames it.
        with temporary_folder(path) as folder, temporary_path(folder, path.name) as temporary:
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata=metadata)
            put(temporary, path, mode)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a model file; raises `UserError` if there is none, or its format version is another."""
    if not path.is_file():
        raise UserError(f"{path}: no such model file; give a shipped model's name or a .safetensors file")
    try:
        header = from_json(dict, json.loads(own_metadata(path)), where="header")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged model header: {error}") from error
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this program reads {FORMAT_VERSION}: update latent-codec")
    return header


def own_metadata(path: Path) -> str:
    """Return the text under the metadata key `latent_codec`; raises `UserError` if there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); nothing is ever loaded from pickles") from error
    if KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not written by latent_codec (no '{KEY}' in its metadata)")
    return metadata[KEY]


def check_finite(tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Raise `UserError` naming the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: tensor {name} holds values that are not finite; the model is unusable")


def check_state(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Raise `UserError` naming tensors that are missing, extra or of another shape."""
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{where}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    if extra := sorted(set(found) - set(expected)):
        raise UserError(f"{where}: {len(extra)} tensors are unknown: {', '.join(extra[:5])}")
    for name, tensor in expected.items():
        if tensor.shape != found[name].shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(found[name].shape)}, the config asks for "
                f"{tuple(tensor.shape)}"
            )


def read_state(path: Path, expected: dict[str, torch.Tensor], remedy: str) -> dict[str, torch.Tensor]:
    """Read a file of tensors like the expected ones; raises `UserError` with the remedy if it is not one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        found = load_file(path)
        check_state(expected, found, str(path))
        check_finite(found, path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); {remedy}") from error
    except UserError as error:
        raise UserError(f"{error}; {remedy}") from error
    return found
