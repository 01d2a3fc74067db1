"""Draw the images that tests of evaluations share, and pass them through networks and coder one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.images.geometry import Image, pad
from latent_codec.model.codec import Codec
from latent_codec.prior.quantizer import step_code
from tests.conftest import Draw

SIZES = {"a.png": (24, 16), "b/c.png": (17, 33), "d.png": (9, 7), "e.png": (40, 40)}


@pytest.fixture
def photos(tmp_path: Path, draw: Draw, request: pytest.FixtureRequest) -> Path:
    """Draw the images of the module's SIZES."""
    for i, (name, size) in enumerate(request.module.SIZES.items()):
        draw(tmp_path / "photos" / name, *size, mode="L" if name == "grey.png" else "RGB", seed=i)
    return tmp_path / "photos"


@torch.inference_mode()
def encoded(codec: Codec, pixels: torch.Tensor) -> Any:
    """Return the posterior of one image (3, h, w)."""
    return codec.encode(pad(pixels, codec.factor)[None])


@torch.inference_mode()
def decoded(codec: Codec, z: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the pixels (3, h, w) that latents (1, z, h/f, w/f) decode to, of the size of another image."""
    return codec.decode_uint8(z)[0, :, : like.shape[1], : like.shape[2]]


def compressed(codec: Codec, image: Image, step: float, prior: Any = None) -> Any:
    """Return an image's file at a step, with its ideal size."""
    coder = StreamCodec(codec, "cpu", prior)
    scaled = coder.scale(encoded(codec, image.pixels).mean[0], step_code(step), None)
    return coder.compress([(scaled, image.geometry)])[0]
