"""Measure the weights of error feedback: the Gram matrix of a decoder's Jacobian, averaged over images."""

from collections.abc import Iterable

import numpy as np
import torch

from latent_codec.model.codec import Codec
from latent_codec.prior.error_feedback import REACH, WEIGHT_BITS, Feedback

PLACES = 24
"""Number of images to measure, at one place each."""

_SIDE = 2 * REACH + 9  # of the square of latents that is decoded


@torch.no_grad()
def measure(codec: Codec, latents: Iterable[torch.Tensor], channel_steps: np.ndarray) -> Feedback | None:
    """Measure the decoder around the middle of each image's latents (z, h, w), with channel steps (z,).

    Returns None if no latents are large enough, or if the decoder's receptive field is the whole image: its Gram matrix
    is then not one of neighbours, and too costly to measure.
    """
    if codec.backbone.decoder_margin is None or codec.config.codes is not None:
        return None
    total = None
    for own in latents:
        side = min(_SIDE, *own.shape[1:])
        if side > 2 * REACH:
            top, left = ((s - side) // 2 for s in own.shape[1:])
            gram = _gram(codec, own[:, top : top + side, left : left + side], torch.from_numpy(channel_steps))
            total = gram if total is None else total + gram
    if total is None:
        return None
    own = total[:, :, REACH, REACH].diagonal().clamp(min=1e-12)  # a channel may have no effect at all
    weights = torch.round(total / own[:, None, None, None] * 2**WEIGHT_BITS).clamp(-(2**15) + 1, 2**15 - 1)
    return Feedback(weights.to(torch.int16).numpy())


def _gram(codec: Codec, z: torch.Tensor, channel_steps: torch.Tensor) -> torch.Tensor:
    """Return the products of one step of each channel in the middle with steps around it.
    They are (z, z, 3, 3) float64, in squared pixels."""
    device, middle = next(codec.parameters()).device, z.shape[1] // 2
    channels = len(z)
    channel_steps = channel_steps.to(device)
    around = z.to(device).expand(channels, -1, -1, -1).clone()  # one copy for each channel
    moved = around.clone()
    moved[range(channels), range(channels), middle, middle] += channel_steps
    labels = torch.zeros(channels, dtype=torch.int64, device=device)
    with torch.enable_grad():
        pixels = codec.decode(around.requires_grad_(), labels)
        change = codec.decode(moved, labels) - pixels
        (rows,) = torch.autograd.grad(pixels, around, change.detach())  # J' (change of the pixels)
    near = slice(middle - REACH, middle + REACH + 1)
    return (rows[:, :, near, near] * channel_steps[:, None, None]).cpu().double()
