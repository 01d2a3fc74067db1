"""The picture at every evaluation: people look before they read."""

from pathlib import Path

import torch
from einops import rearrange
from PIL import Image

from latent_codec.codec import Codec
from latent_codec.files import atomic_path
from latent_codec.noise import fold, normal

COLUMNS = 8


@torch.no_grad()
def write_grid(path: Path, codec: Codec, pixels: torch.Tensor, keys: torch.Tensor) -> None:
    """Rows: input, decoded mode, decoded sample, decoded prior sample. pixels (n, 3, h, w) uint8, keys (n,) int64."""
    pixels, keys = pixels[:COLUMNS], keys[:COLUMNS]
    posterior = codec.encode(pixels)
    noise = normal(keys, tuple(posterior.mean.shape[1:]))
    prior = normal(fold(keys, 1), tuple(posterior.mean.shape[1:]))
    rows = [pixels, *(codec.decode_uint8(z) for z in (posterior.mode(), posterior.sample(noise), prior))]
    picture = rearrange(torch.stack(rows), "r n c h w -> (r h) (n w) c").cpu().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
