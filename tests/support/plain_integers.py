"""Whole steps around 0, or the dither: what every prior but a centred one codes."""

import numpy as np
import torch

from latent_codec.prior.quantizer import Quantized, scale, to_integers


def quantize(mean: torch.Tensor, channel_steps: np.ndarray, step: int, seed: int | None) -> Quantized:
    """Of latents (z, h, w); raises `UserError` as `quantizer.scale` does."""
    scaled = scale(mean, channel_steps, step, seed)
    dithered = np.full(scaled.latents.shape, seed is not None)
    values = to_integers(scaled.latents, scaled.dither(), dithered)
    return Quantized(values * 2**17 + scaled.dither(), step, seed)
