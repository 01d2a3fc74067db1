"""Read and write safetensors files with a JSON header under the key `latent_codec` of their metadata."""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from latent_codec.errors import UserError
from latent_codec.storage.files import check_regular, put, temporary_folder, temporary_path
from latent_codec.storage.json_config import dumps, from_json, loads, to_json

Shapes = Mapping[str, tuple[int, ...]]
KEY = "latent_codec"
FORMAT_VERSION = 1
_FLOATS = frozenset({"F32", "F16", "BF16"})


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
            write_tensors(temporary, tensors, metadata)
            put(temporary, path, mode)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; raises `OSError` with the system's error number, which the library leaves in words."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
        raise OSError(f"{path}: cannot be written: {error}") from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a model file; raises `UserError` if there is none, or its format version is another."""
    if not path.is_file():
        raise UserError(f"{path}: no such model file; give a shipped model's name or a .safetensors file")
    try:
        header = from_json(dict, loads(own_metadata(path)), where="header")
    except ValueError as error:
        raise UserError(f"{path}: damaged model header: {error}") from error
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}; this program reads {FORMAT_VERSION}: update latent-codec")
    return header


def own_metadata(path: Path) -> str:
    """Return the text under the metadata key `latent_codec`; raises `UserError` if there is none."""
    try:
        with open_tensors(path) as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({error}); nothing is ever loaded from pickles") from error
    if KEY not in metadata:
        raise UserError(f"{path}: a safetensors file, but not written by latent_codec (no '{KEY}' in its metadata)")
    return metadata[KEY]


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raises `SafetensorError`, and `OSError` for a pipe, which would block for ever."""
    check_regular(path)
    with safe_open(path, framework="pt") as file:
        yield file


def stored_shapes(path: Path, is_weight: Callable[[str], bool] = lambda _: True) -> Shapes:
    """Return the shapes of the tensors in a safetensors file, without reading their values.

    Raises `UserError` for a weight that is neither float32, float16 nor bfloat16, and for a file that this machine's
    memory cannot hold as float32.
    """
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
        for name, found in slices.items():
            if is_weight(name) and (kind := found.get_dtype()) not in _FLOATS:
                raise UserError(f"{path}: tensor {name} has the type {kind}; weights are {', '.join(sorted(_FLOATS))}")
    size, memory = 4 * sum(map(math.prod, shapes.values())), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(f"{path}: its tensors take {size / 2**30:.0f} GiB, this machine has {memory / 2**30:.0f} GiB")
    return shapes


def check_claim(config: Any, build: Callable[[], nn.Module], shapes: Shapes, where: Path) -> None:
    """Raise `UserError` unless a configuration makes a module that has tensors of these shapes.

    The module is built without memory, once `check_numbers` has bounded its size.
    """
    check_numbers(config, shapes, where)
    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (ArithmeticError, IndexError, MemoryError, RuntimeError, ValueError) as error:
        raise UserError(f"{where}: no model can be made of its config: {error}") from error
    check_shapes(shapes_of(expected), shapes, str(where))


def check_numbers(config: Any, shapes: Shapes, where: Path) -> None:
    """Raise `UserError` if a number in a configuration exceeds the elements of its tensors, or a depth their count.

    A few bytes of JSON could otherwise ask for any amount of memory and time.
    """
    elements = sum(map(math.prod, shapes.values()))
    for field, value in _integers(to_json(config)):
        most = len(shapes) if field.endswith(("depth", "depths", "layers_per_block")) else elements
        if value > most:
            raise UserError(
                f"{where}: no model can be made of its config: {field} is {value}, but the file holds only {elements} "
                f"numbers in {len(shapes)} tensors"
            )


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Return the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _integers(value: Any, field: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, int):
        yield field, value
    elif isinstance(value, list):
        yield from (pair for item in value for pair in _integers(item, field))
    elif isinstance(value, dict):
        yield from (pair for key, item in value.items() for pair in _integers(item, key))


def check_finite(tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Raise `UserError` naming the first tensor with a value that is not finite."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: tensor {name} holds values that are not finite; the model is unusable")


def check_state(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Raise `UserError` naming tensors that are missing, extra or of another shape."""
    check_shapes(shapes_of(expected), shapes_of(found), where)


def check_shapes(expected: Shapes, found: Shapes, where: str) -> None:
    """Raise `UserError` naming tensors that are missing, extra or of another shape."""
    if missing := sorted(set(expected) - set(found)):
        raise UserError(f"{where}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    if extra := sorted(set(found) - set(expected)):
        raise UserError(f"{where}: {len(extra)} tensors are unknown: {', '.join(extra[:5])}")
    for name, shape in expected.items():
        if shape != found[name]:
            raise UserError(f"{where}: tensor {name} has shape {found[name]}, the config asks for {shape}")


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
