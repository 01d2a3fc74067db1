"""Measure the largest activation of a model in float32, to decide whether float16 can hold it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from latent_codec.noise import fold, hashes, normal

FLOAT16_MAX = 65504.0
MARGIN = 4.0
"""Factor by which images that were not measured may exceed the measured peak."""

PROBE_SIDE = 128  # pixels, of the made-up images
_MAX_SIDE = 256  # pixels, of the middle of a given image


class Peak:
    """Keep the largest magnitude seen so far; a NaN, once seen, stays."""

    value: float = 0.0

    def see(self, x: torch.Tensor) -> None:
        found = x.detach().abs().amax().item() if x.numel() else 0.0
        if found > self.value or math.isnan(found):
            self.value = found


def overflows(peak: float) -> bool:
    """Return True if `MARGIN` times the peak exceeds float16's range, or the peak is NaN."""
    return not peak * MARGIN <= FLOAT16_MAX  # also true of NaN


@contextmanager
def watched(network: nn.Module) -> Iterator[Peak]:
    """Measure the peak of the outputs of all modules of a network while the context is open."""
    peak = Peak()

    def see(_: nn.Module, __: tuple[object, ...], output: object) -> None:
        if isinstance(output, torch.Tensor):
            peak.see(output)

    handles = [module.register_forward_hook(see) for module in network.modules()]
    try:
        yield peak
    finally:
        for handle in handles:
            handle.remove()


def made_up_images(channels: int, factor: int, side: int = PROBE_SIDE) -> Iterator[torch.Tensor]:
    """Yield black, white, a ramp, a checkerboard, steps and noise, (1, channels, side, side) uint8, always the same.

    They are what photographs are not: normalisation amplifies flat areas, and filters answer to noise and edges. `side`
    is rounded up to a multiple of `factor`.
    """
    side = -(-side // factor) * factor
    line = torch.arange(side)
    ramp = (line * 255 // (side - 1)).expand(side, side)
    board = (line[:, None] // 2 + line // 2) % 2 * 255
    steps = ((line[:, None] // 16 * 5 + line // 16 * 3) % 8) * 36
    flat = torch.zeros(side, side, dtype=torch.int64)
    for gray in (flat, flat + 255, ramp, board, steps):
        yield torch.stack([gray if c % 2 == 0 else gray.T.flip(0) for c in range(channels)])[None].to(torch.uint8)
    yield (hashes(fold(0), channels * side * side) & 255).view(1, channels, side, side).to(torch.uint8)


def middles(images: Iterable[torch.Tensor], factor: int) -> Iterator[torch.Tensor]:
    """Crop images (1, c, h, w), whose sides are multiples of `factor`, to their middle of at most 256x256 pixels."""
    most = max(_MAX_SIDE // factor, 1) * factor
    for pixels in images:
        starts = [(size - min(size, most)) // 2 for size in pixels.shape[2:]]
        yield pixels[..., starts[0] : starts[0] + most, starts[1] : starts[1] + most]


def standard_noise(like: torch.Tensor) -> torch.Tensor:
    """Return standard normal noise of the shape of `like`, (1, z, h, w), always the same."""
    return normal(fold(1)[None], tuple(like.shape[1:])).to(like.device)
