"""Resize and crop images with Pillow, with the filters that are nearest to those of the trainers."""

import dataclasses

import numpy as np
import torch
from PIL import Image as PilImage

from latent_codec.images.buckets import ResizeOptions, record
from latent_codec.images.geometry import Image, check_size

_SHRINK, _ENLARGE = PilImage.Resampling.HAMMING, PilImage.Resampling.LANCZOS
"""Filters of Pillow. The trainers enlarge by Pillow's Lanczos too, and shrink by OpenCV's INTER_AREA, an average that
counts the parts of pixels: of Pillow's filters Hamming is the nearest to it (Box counts whole pixels)."""


def resized(image: Image, options: ResizeOptions, max_pixels: int) -> Image:
    """Resize and crop an image, and record its own size; raises `UserError` if more than `max_pixels` came of it."""
    size = image.geometry.width, image.geometry.height
    placement = options.placement(size)
    width, height = placement.resized
    check_size(height, width, max_pixels)
    pil = PilImage.fromarray(image.pixels.permute(1, 2, 0).contiguous().numpy())
    if placement.resized != size:
        pil = pil.resize(placement.resized, _SHRINK if width <= size[0] and height <= size[1] else _ENLARGE)
    pixels = torch.from_numpy(np.array(pil.crop(placement.crop))).permute(2, 0, 1).contiguous()  # (3, h, w)
    geometry = dataclasses.replace(
        image.geometry, width=pixels.shape[2], height=pixels.shape[1], resized=record(size, placement)
    )
    return Image(pixels, geometry)
