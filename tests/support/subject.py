"""Code one smooth image with a codec that codes it well, and read single streams."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import interpolate

from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.rate_control import Rate, compress_at_rate
from latent_codec.bitstream.stream_codec import CompressedImage, StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.images.geometry import as_shown, crop, pad
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from latent_codec.model.networks.linear import PatchMoments
from latent_codec.model.networks.lite import LiteBackbone
from latent_codec.prior.quantizer import Scaled
from tests.support.latents import geometry

WIDTH, HEIGHT = 45, 30


def decompress(reader: StreamReader, data: bytes, max_pixels: int = 2**27) -> torch.Tensor:
    """Return the latents of one file, read with every check there is."""
    stream = unpack(data, max_pixels=max_pixels)
    reader.check(stream)
    (found,) = reader.decompress([stream])
    if isinstance(found, UserError):
        raise found
    return found


class Subject:
    """An image, its latents and a codec that is the best linear one for it, so that finer steps are worth having."""

    def __init__(self, codec: Codec, prior: Any, seed: int | None, mode: Any = "RGB") -> None:
        self.seed = seed
        self.geometry = geometry(WIDTH, HEIGHT, mode=mode)
        generator = torch.Generator().manual_seed(5)
        coarse = torch.rand(1, 1 if mode == "L" else 3, 5, 7, generator=generator)
        smooth = interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[0]
        self.pixels = (255 * smooth.clamp(0, 1)).to(torch.uint8).expand(3, -1, -1)
        x = codec.likelihood.from_uint8(pad(self.pixels, 8))
        mean = x.mean((1, 2)).double()
        patches = x.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
        patches = patches.double() - mean.repeat_interleave(64)
        assert isinstance(codec.backbone, LiteBackbone)
        codec.backbone.linear.start_from_closed_form(PatchMoments(mean, patches.T @ patches / len(patches)), 0.01)
        self.stream = StreamCodec(codec, "cpu", prior)
        with torch.inference_mode():
            self.mean = codec.encode(pad(self.pixels, codec.factor)[None]).mean[0]

    def scale(self, step: int) -> Scaled:
        return self.stream.scale(self.mean, step, self.seed)

    def compress(self, scale: Callable[[int], Scaled] | None = None, **rate: Any) -> CompressedImage:
        return compress_at_rate(self.stream, scale or self.scale, self.geometry, self.pixels, Rate(**rate), 1536)

    @functools.cache  # noqa: B019 (one for each module of tests)
    def size(self, step: int) -> int:
        return len(self.stream.compress([(self.scale(step), self.geometry)])[0].data)

    @functools.cache  # noqa: B019
    def psnr(self, step: int) -> float:
        z = self.stream.dequantize(self.stream.code(self.scale(step)).quantized)
        with torch.inference_mode():
            decoded = crop(self.stream.codec.decode_uint8(z[None]), self.geometry)[0]
        return distortion.psnr(as_shown(decoded, self.geometry)[None], self.pixels[None]).item()
