"""What every command over many images shares: reading ahead in threads, batches of one shape, and who failed why."""

import dataclasses
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from latent_codec import tiling
from latent_codec.bottlenecks import DiagonalGaussian
from latent_codec.codec import Codec
from latent_codec.colour import parse_colour
from latent_codec.errors import UserError
from latent_codec.images import Geometry, crop, pad, read_image, write_image
from latent_codec.inputs import Source

T = TypeVar("T")
R = TypeVar("R")
ImageFormat = Literal["png", "webp", "jpg"]


@dataclasses.dataclass
class Summary:
    """What became of the images: done + failed = found."""

    verb: str
    found: int = 0
    done: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    pixels: int = 0
    """Of the images done, where bytes per pixel are of interest."""
    seconds: float = 0.0

    def fail(self, name: str, reason: object) -> None:
        text = str(reason) if isinstance(reason, (UserError, str)) else f"{type(reason).__name__}: {reason}"
        self.failures[name] = text
        tqdm.write(text if text.startswith(name) else f"{name}: {text}", file=sys.stderr)

    def __str__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        rate = f", {8 * self.bytes_out / self.pixels:.3f} bits per pixel" if self.pixels else ""
        return (
            f"{self.verb} {self.done} of {self.found} images{failed} in {self.seconds:.1f} s "
            f"({self.done / max(self.seconds, 1e-9):.1f} images/s); {self.bytes_in / 1e6:.2f} MB in, "
            f"{self.bytes_out / 1e6:.2f} MB out{rate}"
        )


class Compute(NamedTuple):
    """Where and how the networks run."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_size: int
    workers: int
    """Threads that read and write image files."""
    tile: int | None = None
    """Side in pixels of the tiles that larger images are cut into (`latent_codec.tiling`); None leaves all whole."""

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device.split(":")[0], dtype=dtype, enabled=self.dtype != "float32")


class Networks:
    """A codec's networks, run as `compute` says. Where tiles change results, the first image shows by how much."""

    def __init__(self, codec: Codec, compute: Compute) -> None:
        """Raises `UserError` for a tile that the model cannot have."""
        if compute.tile is not None:
            tiling.check_tile(codec, compute.tile)
        self.codec, self.compute = codec, compute
        self._silent = tiling.is_exact(codec)

    def encode(self, images: Sequence[torch.Tensor]) -> DiagonalGaussian:
        """The posterior, on the CPU, of images (3, h, w) uint8 of one shape."""
        pixels = torch.stack(list(images)) if len(images) > 1 else images[0][None]
        with torch.inference_mode(), self.compute.autocast():
            posterior = tiling.encode(self.codec, pixels, self.compute.tile)
            self._report(pixels, self.codec.factor, tiling.encode_error)
        return posterior

    def decode_uint8(self, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pixels (b, 3, h, w) uint8, on the CPU, of latents (z, h/f, w/f) of one shape."""
        z = torch.stack(list(latents)) if len(latents) > 1 else latents[0][None]
        with torch.inference_mode(), self.compute.autocast():
            pixels = tiling.decode_uint8(self.codec, z, self.compute.tile)
            self._report(z, 1, tiling.decode_error)
        return pixels

    def _report(self, x: torch.Tensor, scale: int, measure: Callable[[Codec, torch.Tensor, int], object]) -> None:
        """Say on stderr, once, what tiles change of x, which has `scale` elements along a side for each latent one."""
        height, width = (size // scale for size in x.shape[2:])
        tile = self.compute.tile
        if self._silent or tile is None or not self.cuts(height, width):
            return
        self._silent = True
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in tiling.seam(self.codec, height, width, tile))
        error = measure(self.codec, x[:1, :, rows, columns], tile)
        tqdm.write(
            f"tiles of {tile} pixels change what this model gives; in a part of the first such image {error}; "
            "a larger --tile changes less",
            file=sys.stderr,
        )

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image with latents (height, width) goes in tiles."""
        return tiling.cuts(height * width * self.codec.factor**2, self.compute.tile)


class Read(NamedTuple):
    source: Source
    data: bytes
    pixels: torch.Tensor  # (3, h, w) uint8, padded to multiples of the factor
    geometry: Geometry


def check_options(background: str, max_pixels: int) -> None:
    """Raise `UserError`, once and not for each image, if these are no options to read images with."""
    parse_colour(background)
    if max_pixels < 1:
        raise UserError(f"a limit of {max_pixels} pixels refuses every image; it must be at least 1")


def check_rgb(codec: Codec) -> None:
    if codec.config.image_channels != 3:
        raise UserError(f"a model of images with {codec.config.image_channels} channels; image files need one with 3")


def check_absent(outputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise `UserError` if outputs exist that are not to be replaced."""
    existing = [] if overwrite else [path for path in outputs if _exists(path)]
    if existing:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UserError(f"exists already: {existing[0]}{others}; give another folder, or --overwrite to replace them")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long: writing it will fail, and that is counted
        return False


def image_batches(
    networks: Networks,
    sources: Sequence[Source],
    summary: Summary,
    bar: Any,
    *,
    background: str,
    max_pixels: int,
) -> Iterator[list[Read]]:
    """The images, read ahead, padded and in batches of one shape; those that cannot be read are counted as failed."""

    def read(source: Source) -> Read:
        try:
            data = source.read_bytes()
        except OSError as error:
            raise UserError(f"{source.name}: cannot be read: {error.strerror or error}") from error
        image = read_image(data, max_pixels=max_pixels, background=background, name=source.name)
        return Read(source, data, pad(image.pixels, factor), image.geometry)

    factor, compute = networks.codec.factor, networks.compute
    outcomes = in_threads(read, sources, compute.workers)
    yield from batches(
        successes(outcomes, summary, bar),
        compute.batch_size,
        lambda r: r.pixels.shape,
        alone=lambda r: networks.cuts(r.pixels.shape[1] // factor, r.pixels.shape[2] // factor),
    )


class Decoded(NamedTuple):
    name: str
    pixels: torch.Tensor  # (3, h, w) uint8, still padded
    geometry: Geometry
    path: Path
    """Where it goes."""


def write_images(
    images: Iterable[Decoded], image_format: ImageFormat, workers: int, summary: Summary, bar: Any
) -> None:
    """Write decoded images in threads and count them, and their bytes."""

    def write(image: Decoded) -> int:
        try:
            write_image(image.path, crop(image.pixels, image.geometry), image.geometry, image_format)
            return image.path.stat().st_size
        except OSError as error:
            raise UserError(f"{image.name}: {image.path} cannot be written: {error.strerror or error}") from error

    for image, future in in_threads(write, images, workers):
        try:
            summary.bytes_out += future.result()
            summary.done += 1
        except Exception as error:
            summary.fail(image.name, error)
        bar.update()


def in_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, "Future[R]"]]:
    """(item, finished future) in order, a bounded number ahead."""
    with ThreadPoolExecutor(workers) as pool:
        iterator = iter(items)
        waiting = [(item, pool.submit(work, item)) for item in islice(iterator, 2 * workers)]
        while waiting:
            item, future = waiting.pop(0)
            future.exception()  # wait; the caller asks for the result
            waiting += [(later, pool.submit(work, later)) for later in islice(iterator, 1)]
            yield item, future


def successes(outcomes: Iterable[tuple[Source, "Future[R]"]], summary: Summary, bar: Any) -> Iterator[R]:
    for source, future in outcomes:
        try:
            result = future.result()
        except Exception as error:  # whatever a stranger's file sets off, the others go on
            summary.fail(source.name, error)
            bar.update()
        else:
            yield result


def batches(
    items: Iterable[T], size: int, shape: Callable[[T], Hashable], *, alone: Callable[[T], bool]
) -> Iterator[list[T]]:
    """Lists of up to `size` items of equal shape: images are never padded to each other's size.

    At most 4 * size items wait for companions; those that go `alone` wait for none.
    """
    waiting: dict[Hashable, list[T]] = {}
    for item in items:
        if alone(item):
            yield [item]
            continue
        group = waiting.setdefault(shape(item), [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(shape(item))
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda s: len(waiting[s])))
    yield from waiting.values()
