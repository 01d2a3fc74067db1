"""Safetensors files of others, written and read."""

import json
from typing import Any

import torch
from safetensors.torch import save

from latent_codec.interop.caches.cache import About
from latent_codec.storage.tensors import KEY


def file_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file, equal for equal contents: the library writes metadata of more than one key in an order of chance."""
    plain = save(tensors)
    size = int.from_bytes(plain[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(plain[8 : 8 + size])).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + plain[8 + size :]


def latents_in(found: torch.Tensor) -> torch.Tensor:
    """(z, h, w) float32; raises `ValueError` for anything else than three dimensions of floating-point numbers."""
    if found.ndim != 3 or not found.is_floating_point():
        raise ValueError(
            f"it holds {found.dtype} {tuple(found.shape)} where latents (channels, height, width) should be"
        )
    return found.float()


def about_in(file: Any) -> About | None:
    """Of an open safetensors file's metadata."""
    text = (file.metadata() or {}).get(KEY)
    return None if text is None else About.parse(text)
