"""Write NumPy's files so that equal arrays give equal bytes, and read them without pickle."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from latent_codec.interop.caches.cache import Origin

ORIGIN_KEY = "latent_codec"
"""Key of the `Origin` in files that have keys."""


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


def load(source: Path | bytes) -> Any:
    """Return an array or an `NpzFile`; raises `OSError`, or `ValueError` for what would need pickle."""
    try:
        return np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False)
    except EOFError as error:
        raise ValueError("it is empty") from error


def latents_in(array: np.ndarray) -> torch.Tensor:
    """Return latents (z, h, w) float32; raises `ValueError` unless the array is floating-point and of 3 dimensions."""
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"it holds {array.dtype} {array.shape} where latents (channels, height, width) should be")
    return torch.from_numpy(array.astype(np.float32))


def origin_in(file: NpzFile) -> Origin | None:
    """Return the origin that a .npz file holds, if any."""
    return Origin.parse(file[ORIGIN_KEY].tobytes().decode()) if ORIGIN_KEY in file else None
