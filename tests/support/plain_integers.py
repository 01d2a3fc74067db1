"""Quantise latents around 0 or the dither, as every prior but a centred one does."""

import numpy as np
import torch

from latent_codec.prior.quantizer import FINE, Quantized, scale, to_integers


def quantize(mean: torch.Tensor, channel_steps: np.ndarray, step: int, seed: int | None) -> Quantized:
    """Quantise latents (z, h, w); raise `UserError` as `quantizer.scale` does."""
    scaled = scale(mean, channel_steps, step, seed)
    dithers = scaled.settings.dither()
    return Quantized(to_integers(scaled.latents, dithers, np.array(seed is not None)) * FINE + dithers, step, seed)
