"""numpy's files as bytes, equal for equal arrays, and safely back."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from latent_codec.interop.caches.cache import About

ABOUT = "latent_codec"
"""Key of an `About` in files that have keys."""


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz(arrays: dict[str, np.ndarray], about: About) -> bytes:
    """Uncompressed; zip's times are 1980's."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **{ABOUT: np.frombuffer(about.text().encode(), np.uint8)})  # pyright: ignore
    return buffer.getvalue()


def load(source: Path | bytes) -> Any:
    """An array or an `NpzFile`; nothing that would need pickle. Raises `OSError` or `ValueError`."""
    try:
        return np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False)
    except EOFError as error:
        raise ValueError("it is empty") from error


def tensor(array: np.ndarray) -> torch.Tensor:
    """(z, h, w) float32; raises `ValueError` for anything else than three dimensions of floating-point numbers."""
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"it holds {array.dtype} {array.shape} where latents (channels, height, width) should be")
    return torch.from_numpy(array.astype(np.float32))


def about(file: NpzFile) -> About | None:
    return About.parse(file[ABOUT].tobytes().decode()) if ABOUT in file else None
