"""Read and decode the images of a run, in threads or in processes."""

from typing import Any

import numpy as np
import torch

from latent_codec.folders.workers import Processes
from latent_codec.images.geometry import Geometry, Image, pad
from latent_codec.images.read import ReadOptions, read_image
from latent_codec.images.sources import Source


def parse_image(
    source: Source, data: bytes, *, factor: int, background: str, max_pixels: int
) -> tuple[tuple[int, ...], Image]:
    """An image padded to multiples of the factor, after its shape; raises `UserError` as `read_image` does."""
    image = read_image(data, ReadOptions(background=background, max_pixels=max_pixels), name=source.name)
    pixels = pad(image.pixels, factor)
    return tuple(pixels.shape), Image(pixels, image.geometry)


def parse_image_in(processes: Processes, source: Source, data: bytes, **options: Any) -> tuple[tuple[int, ...], Image]:
    """`parse_image` with its options, in one of the processes; raises as it and `Processes.call` do."""
    pixels, geometry = processes.call(_parse_array, source, data, options)
    return pixels.shape, Image(torch.from_numpy(pixels), geometry)


def _parse_array(source: Source, data: bytes, options: dict[str, Any]) -> tuple[np.ndarray, Geometry]:
    """An array: between processes a tensor would take a file handle and shared memory, of which there may be little."""
    pixels, geometry = parse_image(source, data, **options)[1]
    return pixels.numpy(), geometry
