"""Read and decode the images of a run, in threads or in processes."""

from typing import Literal

import numpy as np
import torch

from latent_codec.errors import UserError
from latent_codec.folders.jobs import Shape
from latent_codec.folders.workers import Processes
from latent_codec.images.geometry import Geometry, Image, check_size, pad
from latent_codec.images.read import ReadOptions, read_image
from latent_codec.images.sources import Source
from latent_codec.inference.runner import Runner


class ImageReader:
    """Read image files for a model: half of a `Maker`."""

    verb: Literal["encode", "decode", "trim"] = "encode"

    def __init__(self, runner: Runner, options: ReadOptions) -> None:
        self.runner, self._read_options, self.is_large = runner, options, runner.cuts

    def load(self, source: Source) -> bytes:
        """Return an image file's bytes; raises as `Source.read_bytes` does."""
        return source.read_bytes()

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, Image]:
        """Return an image padded to multiples of the factor; raises as `read_image` and `Processes.call` do."""
        self.runner.codec.class_numbers([source.label])  # here an unknown class fails for this image alone
        array, geometry = decoders.call(padded, source.name, data, self.runner.codec.factor, self._read_options)
        return array.shape, Image(torch.from_numpy(array), geometry)


def padded(name: str, data: bytes, factor: int, options: ReadOptions) -> tuple[np.ndarray, Geometry]:
    """Read an image as an array, which takes no shared memory between processes; raises as `read_image` does."""
    image = read_image(data, options, name=name)
    try:
        check_size(image.geometry.height, image.geometry.width, options.max_pixels, factor)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return pad(image.pixels, factor).numpy(), image.geometry
