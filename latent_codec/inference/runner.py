"""Run a codec's networks on a device, in batches and tiles."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from latent_codec.errors import FatalError
from latent_codec.inference import tiling
from latent_codec.inference.options import ComputeOptions
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import Posterior
from latent_codec.program import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptions:
    """Hold `ComputeOptions` with nothing left to choose."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_size: int
    workers: int
    decode_in: Literal["threads", "processes"]
    compile: bool
    tile: int


class Runner:
    """Run a codec's networks as `options` say; of the first image that tiles change, say on stderr by how much."""

    def __init__(self, codec: Codec, options: ComputeOptions = ComputeOptions()) -> None:
        """Move the codec to `options.device` and resolve the options; raise `UserError` for those that cannot be."""
        options.check()
        if options.device is not None:
            codec.to(options.device)
        device = options.device or str(next(codec.parameters()).device)
        if options.tile is not None:
            tiling.check_tile(codec, options.tile)
        on_cpu = device.startswith("cpu")
        self.codec = codec
        resolved: dict[str, Any] = {
            "device": device,
            "workers": options.workers or (4 if on_cpu else max(1, min(16, _own_cores()))),
            "decode_in": options.decode_in or ("threads" if on_cpu else "processes"),
            "tile": options.tile or tiling.default_tile(codec),
        }
        self.options = ResolvedOptions(**vars(options) | resolved)
        if options.compile:
            codec.compile()
        self._silent = {tiling.encode_difference, tiling.decode_difference} if tiling.is_exact(codec) else set()

    @functools.cached_property
    def model_id(self) -> str:
        """Return the codec's id, computed once: its weights stay as they are while a runner has it."""
        return self.codec.model_id

    def autocast(self) -> torch.autocast:
        """Return the context in which networks run in `options.dtype`."""
        dtype = getattr(torch, self.options.dtype)
        return torch.autocast(self.options.device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32)

    def encode(self, images: Sequence[torch.Tensor], labels: torch.Tensor | None = None) -> Posterior:
        """Return the posterior, on the CPU, of images (3, h, w) uint8 of one shape; `FatalError` if compiling fails."""
        pixels = torch.stack(list(images)) if len(images) > 1 else images[0][None]
        with torch.inference_mode(), self.autocast(), _compiling(self.options.compile):
            posterior = tiling.encode(self.codec, pixels, self.options.tile, labels)
            self._report(pixels, labels, self.codec.factor, tiling.encode_difference)
        return posterior

    def decode_uint8(self, latents: Sequence[torch.Tensor], labels: torch.Tensor | None = None) -> torch.Tensor:
        """Decode latents (z, h/f, w/f) of one shape to uint8 pixels (b, 3, h, w) on the CPU; raises as `encode`."""
        z = torch.stack(list(latents)) if len(latents) > 1 else latents[0][None]
        with torch.inference_mode(), self.autocast(), _compiling(self.options.compile):
            pixels = tiling.decode_uint8(self.codec, z, self.options.tile, labels)
            self._report(z, labels, 1, tiling.decode_difference)
        return pixels

    def nll_gradient(self, z: torch.Tensor, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return -log p(x | z) in nats and its gradient for one image's latents, as `tiling.nll_gradient` does."""
        with torch.inference_mode(False), self.autocast(), _compiling(self.options.compile):
            z, pixels = z.clone(), pixels.clone()  # what inference mode has made takes no part in a gradient
            return tiling.nll_gradient(self.codec, z, pixels, self.options.tile)

    def _report(self, x: torch.Tensor, labels: torch.Tensor | None, scale: int, measure: Callable[..., object]) -> None:
        """Say on stderr, once, how tiles change x, which has `scale` elements along a side for each latent element."""
        if measure in self._silent or not self.cuts(x.shape, self.codec.factor // scale):
            return
        self._silent.add(measure)
        height, width = (size // scale for size in x.shape[2:])
        tile = self.options.tile
        rows, columns = (
            slice(s.start * scale, s.stop * scale) for s in tiling.middle_part(self.codec, height, width, tile)
        )
        error = measure(self.codec, x[:1, :, rows, columns], tile, None if labels is None else labels[:1])
        say(
            f"tiles of {tile} pixels change this model's results; in a part of the first such image {error}; "
            "a larger --tile changes less",
            error=True,
        )

    def cuts(self, shape: tuple[int, ...], factor: int = 1) -> bool:
        """Return whether an image (..., factor * h, factor * w) is cut into tiles, given `shape` (..., h, w)."""
        return tiling.cuts(shape[-2] * shape[-1] * factor**2, self.options.tile)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the options that results depend on, as JSON; the tile is one where tiles are blended."""
        tile = None if tiling.is_exact(self.codec) else self.options.tile
        return {"dtype": self.options.dtype, "compile": self.options.compile, "tile": tile}


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


def _own_cores() -> int:
    """Return how many of the machine's cores are this process', which shares them with others of its launcher."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return cores // max(1, int(processes) if processes.isdecimal() else 1)
