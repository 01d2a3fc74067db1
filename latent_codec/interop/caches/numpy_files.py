"""Write NumPy's files so that equal arrays give equal bytes, and read them without pickle."""

import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from latent_codec.interop.caches.cache import Origin
from latent_codec.storage.files import open_regular

ORIGIN_KEY = "latent_codec"
"""Key of the `Origin` in files that have keys."""
_MOST_BYTES = 2**28  # latents of 128 channels at 512 x 512 in float32 have half of that


def npy(array: np.ndarray) -> bytes:
    """Return a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz(arrays: dict[str, np.ndarray], origin: Origin) -> bytes:
    """Return an uncompressed .npz file; its members' times are those of 1980."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{ORIGIN_KEY: np.frombuffer(origin.text().encode(), np.uint8)})  # pyright: ignore
    return buffer.getvalue()


class Npz(Mapping[str, np.ndarray]):
    """Hold the arrays of a .npz file, each read when it is asked for."""

    def __init__(self, file: zipfile.ZipFile) -> None:
        self._file = file
        self._names = {name.removesuffix(".npy"): name for name in file.namelist()}

    def __getitem__(self, name: str) -> np.ndarray:
        return _array(unzip(self._file, self._names[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_npz(path: Path) -> Npz:
    """Return the arrays of a .npz file; raises `OSError`, or `ValueError` if it is none."""
    try:
        return Npz(zipfile.ZipFile(io.BytesIO(content(path))))
    except zipfile.BadZipFile as error:
        raise ValueError(f"no .npz file ({error})") from error


def load_npy(source: Path | bytes) -> np.ndarray:
    """Return the array of a .npy file; raises `OSError`, or `ValueError` if it is none or would need pickle."""
    return _array(source if isinstance(source, bytes) else content(source))


def unzip(file: zipfile.ZipFile, name: str) -> bytes:
    """Return a zip file's member; raises `ValueError` if it claims to be larger than latents are."""
    if (size := file.getinfo(name).file_size) > _MOST_BYTES:
        raise ValueError(f"{name} claims {size} bytes, more than the {_MOST_BYTES} that are read")
    return file.read(name)


def content(path: Path) -> bytes:
    """Return a file's bytes; raises `OSError`, or `ValueError` if it is larger than latents are."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes, more than the {_MOST_BYTES} that are read")
        return file.read()


def _array(data: bytes) -> np.ndarray:
    """Parse a .npy file whose data are as long as its header says; NumPy would make room for any claim first."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read(stream)
    except KeyError as error:
        raise ValueError(f"a .npy file of version {error}; this program reads 1 and 2") from error
    if dtype.hasobject:
        raise ValueError("it needs pickle, which can run anything and is never read")
    if math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
        raise ValueError(f"its header claims {shape} values of {dtype}, more than it holds")
    return np.load(io.BytesIO(data), allow_pickle=False)


def latents_in(array: np.ndarray) -> torch.Tensor:
    """Return latents (z, h, w) float32; raises `ValueError` unless the array is floating-point and of 3 dimensions."""
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"it holds {array.dtype} {array.shape} where latents (channels, height, width) should be")
    return torch.from_numpy(array.astype(np.float32))


def origin_in(file: Npz) -> Origin | None:
    """Return the origin that a .npz file holds, if any."""
    return Origin.parse(file[ORIGIN_KEY].tobytes().decode()) if ORIGIN_KEY in file else None
