"""Where and how a codec's networks run."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from latent_codec.errors import FatalError
from latent_codec.inference import tiling
from latent_codec.model.bottlenecks import Posterior
from latent_codec.model.codec import Codec

T = TypeVar("T")
R = TypeVar("R")


class Compute(NamedTuple):
    """Where and how the networks run."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_size: int
    workers: int
    """Images that are read, decoded and written at once."""
    tile: int | None = None
    """Side in pixels of the tiles that larger images are cut into; None leaves all whole."""
    decode_in: Literal["threads", "processes"] = "threads"
    """Where images are decoded."""
    compile: bool = False
    """Have torch compile the networks."""

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device.split(":")[0], dtype=dtype, enabled=self.dtype != "float32")


class Networks:
    """A codec's networks, run as `compute` says. Where tiles change results, the first image shows by how much."""

    def __init__(self, codec: Codec, compute: Compute) -> None:
        """Raises `UserError` for a tile that the model cannot have."""
        if compute.tile is not None:
            tiling.check_tile(codec, compute.tile)
        if compute.compile:
            codec.compile_networks()
        self.codec, self.compute = codec, compute
        self._silent = tiling.is_exact(codec)

    def encode(self, images: Sequence[torch.Tensor], labels: torch.Tensor | None = None) -> Posterior:
        """The posterior, on the CPU, of images (3, h, w) uint8 of one shape; labels as `Codec.encode` takes them.

        Raises `UserError` if the networks cannot be compiled.
        """
        pixels = torch.stack(list(images)) if len(images) > 1 else images[0][None]
        with torch.inference_mode(), self.compute.autocast(), _compiling(self.compute.compile):
            posterior = tiling.encode(self.codec, pixels, self.compute.tile, labels)
            self._report(pixels, labels, self.codec.factor, tiling.encode_error)
        return posterior

    def decode_uint8(self, latents: Sequence[torch.Tensor], labels: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels (b, 3, h, w) uint8, on the CPU, of latents (z, h/f, w/f) of one shape; raises as `encode` does."""
        z = torch.stack(list(latents)) if len(latents) > 1 else latents[0][None]
        with torch.inference_mode(), self.compute.autocast(), _compiling(self.compute.compile):
            pixels = tiling.decode_uint8(self.codec, z, self.compute.tile, labels)
            self._report(z, labels, 1, tiling.decode_error)
        return pixels

    def nll_gradient(self, z: torch.Tensor, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
        """-log p(x given z) in nats and its gradient (z, h, w) float32, on the CPU, of one image's latents (z, h, w).

        pixels: (3, height, width) uint8, not padded. Where tiles are blended their own parts count alone.
        """
        with torch.inference_mode(False), self.compute.autocast(), _compiling(self.compute.compile):
            z, pixels = z.clone(), pixels.clone()  # what inference mode has made takes no part in a gradient
            return tiling.nll_gradient(self.codec, z, pixels, self.compute.tile)

    def _report(self, x: torch.Tensor, labels: torch.Tensor | None, scale: int, measure: Callable[..., object]) -> None:
        """Say on stderr, once, what tiles change of x, which has `scale` elements along a side for each latent one."""
        height, width = (size // scale for size in x.shape[2:])
        tile = self.compute.tile
        if self._silent or tile is None or not self.cuts(height, width):
            return
        self._silent = True
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in tiling.seam(self.codec, height, width, tile))
        error = measure(self.codec, x[:1, :, rows, columns], tile, None if labels is None else labels[:1])
        tqdm.write(
            f"tiles of {tile} pixels change what this model gives; in a part of the first such image {error}; "
            "a larger --tile changes less",
            file=sys.stderr,
        )

    def cuts_pixels(self, shape: tuple[int, ...]) -> bool:
        """Whether an image (..., h, w) goes in tiles."""
        return tiling.cuts(shape[-2] * shape[-1], self.compute.tile)

    def cuts_latents(self, shape: tuple[int, ...]) -> bool:
        """Whether the image of latents (..., h/f, w/f) goes in tiles."""
        return self.cuts(*shape[-2:])

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image with latents (height, width) goes in tiles."""
        return tiling.cuts(height * width * self.codec.factor**2, self.compute.tile)

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, as JSON."""
        return {"dtype": self.compute.dtype, "compile": self.compute.compile, "tile": self.changing_tile}

    @property
    def changing_tile(self) -> int | None:
        """The tile, if what is computed depends on it."""
        return None if tiling.is_exact(self.codec) else self.compute.tile


@contextlib.contextmanager
def _compiling(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException  # a second's import

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise FatalError(f"torch.compile does not work here ({reason}); leave out --compile") from error
