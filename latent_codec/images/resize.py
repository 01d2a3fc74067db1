"""Resize and crop images with Pillow, with the filters that are nearest to those of the trainers."""

import dataclasses

import numpy as np
import torch
from PIL import Image as PilImage

from latent_codec.images.buckets import ResizeOptions, Size, record
from latent_codec.images.geometry import Image, check_size


def resized(image: Image, options: ResizeOptions, max_pixels: int) -> Image:
    """Resize and crop an image, and record its own size; raises `UserError` if more than `max_pixels` came of it."""
    size = image.geometry.width, image.geometry.height
    placement = options.placement(size)
    width, height = placement.resized
    check_size(height, width, max_pixels)
    pil = PilImage.fromarray(image.pixels.permute(1, 2, 0).contiguous().numpy())
    if placement.resized != size:
        pil = pil.resize(placement.resized, _filter(size, placement.resized))
    pixels = torch.from_numpy(np.array(pil.crop(placement.crop))).permute(2, 0, 1).contiguous()  # (3, h, w)
    geometry = dataclasses.replace(
        image.geometry, width=pixels.shape[2], height=pixels.shape[1], resized=record(size, placement)
    )
    return Image(pixels, geometry)


def _filter(size: Size, resized: Size) -> PilImage.Resampling:
    """Return the filter of Pillow that is nearest to the trainers' own.

    They enlarge by Pillow's Lanczos, and shrink by OpenCV's INTER_AREA, an average that counts parts of pixels. Among
    Pillow's filters Bilinear is the nearest to it on photographs up to a factor of 1.4, and Hamming from there on.
    """
    if size[0] < resized[0] or size[1] < resized[1]:
        return PilImage.Resampling.LANCZOS
    return PilImage.Resampling.BILINEAR if size[0] < 1.4 * resized[0] else PilImage.Resampling.HAMMING
