"""Write safetensors files so that equal contents give equal bytes, and read those of other programs."""

import json
from typing import Any

import torch
from safetensors.torch import save

from latent_codec.interop.caches.cache import Origin
from latent_codec.storage.json_config import loads
from latent_codec.storage.tensors import KEY


def file_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Return a file with the metadata in its given order; the library would write it in a random one."""
    plain = save(tensors)
    size = int.from_bytes(plain[:8], "little")
    header = json.dumps({"__metadata__": metadata} | loads(plain[8 : 8 + size])).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + plain[8 + size :]


def latents_in(found: torch.Tensor) -> torch.Tensor:
    """Return latents (z, h, w) float32; raises `ValueError` unless the tensor is floating-point and of 3 dimensions."""
    if found.ndim != 3 or not found.is_floating_point():
        raise ValueError(
            f"it holds {found.dtype} {tuple(found.shape)} where latents (channels, height, width) should be"
        )
    return found.float()


def origin_in(file: Any) -> Origin | None:
    """Return the origin in an open safetensors file's metadata, if any."""
    text = (file.metadata() or {}).get(KEY)
    return None if text is None else Origin.parse(text)
