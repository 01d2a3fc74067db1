"""Choose the quantiser step at which one image's file keeps to a size or a quality."""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch

from latent_codec.bitstream.stream_codec import CompressedImage, StreamCodec
from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry, as_shown, crop
from latent_codec.inference.tiling import decode_uint8
from latent_codec.metrics.distortion import psnr
from latent_codec.prior.quantizer import MAX_STEP, MIN_STEP, STEP_ONE, Scaled, step_code

FINEST_FOR_PSNR = 1 / 16
"""The finest step that is tried to reach a PSNR; what is still lost there is lost by the networks."""

CLOSE_PSNR = 0.04
"""Decibels by which a file may exceed the PSNR that is asked for; a search to less takes many times as long."""

_USUAL_SLOPE = 5.0  # decibels for an octave of the step

_FINEST, _COARSEST = step_code(MIN_STEP), step_code(MAX_STEP)


def step_of_quality(quality: int) -> float:
    """Return the quantiser step of a quality from 1 to 100: 1 at 50, and half as much for every 12.5 more.
    Raises `UserError` for another quality."""
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality} is outside 1 to 100; 50 is usual, and more keeps more")
    return 2.0 ** ((50 - quality) / 12.5)


Scale = Callable[[int], Scaled]
"""Returns one image's latents divided by a stored step; raises `UserError` as `StreamCodec.scale` does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """Say how much of an image to keep: by a step, a size or a quality, by default by step 1."""

    step: float | None = None
    bpp: float | None = None
    """Largest size of the whole file, in bits per pixel of the image."""
    psnr: float | None = None
    """Least PSNR of the decoded image, in dB."""
    max_bytes: int | None = None
    """Largest size of the whole file, in bytes; it takes precedence over the others."""

    def __post_init__(self) -> None:
        given = [
            f"--{name} {value:g}" for name in ("step", "bpp", "psnr") if (value := getattr(self, name)) is not None
        ]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} each decide how much is kept; give one of them")
        if self.step is not None:
            step_code(self.step)
        for name, unit in (("bpp", "bits per pixel"), ("psnr", "dB")):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} {value:g} must be a positive number of {unit}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"--max-bytes {self.max_bytes} leaves no room for a file; it must be at least 1")

    @property
    def fixed_step(self) -> int | None:
        """Return the stored step of every image, or None where each image needs a search."""
        if self.bpp is None and self.psnr is None and self.max_bytes is None:
            return step_code(self.step or 1.0)
        return None


def compress_at_rate(
    codec: StreamCodec, scale: Scale, geometry: Geometry, pixels: torch.Tensor, rate: Rate, tile: int
) -> CompressedImage:
    """Compress one image, (3, height, width) uint8 pixels and the latents that `scale` returns, as `rate` asks.

    Sizes are of the whole file, and PSNR of the image that `decode` writes with the same `tile`. The step for a size is
    found to within 1/512; as size is not strictly monotone in it, it is the finest that fits among those tried. The
    step for a PSNR is found to within `CLOSE_PSNR`. Raises `UserError`, with the best that is possible, if the image
    cannot be coded so.
    """
    scale(_COARSEST)  # raises if no step can hold the latents

    code = functools.cache(lambda step: codec.code(scale(step)))

    def quality(step: int) -> float:
        z = codec.dequantize(code(step).quantized)
        with torch.inference_mode():
            decoded = crop(decode_uint8(codec.codec, z[None], tile)[0], geometry)
        return psnr(as_shown(decoded, geometry)[None], as_shown(pixels, geometry)[None]).item()

    def compress(step: int) -> CompressedImage:
        return codec.file(code(step), geometry)

    if rate.psnr is not None:
        first = finest = _coarsest_of_quality(quality, rate.psnr)
    elif rate.bpp is not None:
        first, finest = STEP_ONE, _FINEST
    else:
        first = finest = step_code(rate.step or 1.0)
    area = geometry.width * geometry.height
    limits = [] if rate.max_bytes is None else [rate.max_bytes]
    limits += [] if rate.bpp is None else [int(rate.bpp * area / 8)]
    if not limits:
        return compress(first)
    found, smallest = _finest_of_size(compress, min(limits), first, finest)
    if found is None:
        raise UserError(
            f"no step makes the file as small as {min(limits)} bytes ({8 * min(limits) / area:.3f} bits per pixel); "
            f"the smallest has {smallest} bytes ({8 * smallest / area:.3f}): allow at least that"
        )
    return found


def _coarsest_of_quality(quality: Callable[[int], float], target: float) -> int:
    """Return a step at which `quality` comes up to `target` dB, and to less than `CLOSE_PSNR` above it unless it jumps.
    Raises `UserError` if no step does."""
    reached: dict[int, float] = {}
    step, finest = STEP_ONE, step_code(FINEST_FOR_PSNR)
    while step not in reached:
        try:
            reached[step] = quality(step)
        except UserError:  # finer than a stream can hold
            reached[step] = math.inf
        if not 0 <= reached[step] - target < CLOSE_PSNR:
            step = _next_step(reached, target, finest)
    good = [step for step, value in reached.items() if target <= value < math.inf]
    if not good:
        best = max((value for value in reached.values() if value < math.inf), default=-math.inf)
        raise UserError(f"no step brings the decoded image to {target:g} dB; the best reached is {best:.2f} dB")
    return max(good)


def _next_step(reached: dict[int, float], target: float, finest: int) -> int:
    """Return the step to try next, or one that was tried if none is left: PSNR falls about evenly with log2(step).

    Between a step that is good enough and one that is not, it lies on the line through both, but at least a tenth of
    the way from either; with one side alone, on a line of the usual slope or of the slope that was found.
    """
    low = max((step for step, value in reached.items() if value >= target), default=None)
    high = min((step for step, value in reached.items() if value < target), default=None)
    wanted = target + CLOSE_PSNR / 2
    if low is not None and high is not None:
        if high - low <= max(1, low // 512):
            return low
        above, below = reached[low] - wanted, wanted - reached[high]
        share = min(max(above / (above + below), 0.1), 0.9) if math.isfinite(above) else 0.5
        return min(max(round(low * (high / low) ** share), low + 1), high - 1)
    steps = sorted(reached)
    slope, last = _USUAL_SLOPE, steps[-1] if high is None else steps[0]
    if len(steps) > 1 and math.isfinite(sum(reached.values())):
        near = steps[-2] if high is None else steps[1]
        slope = max((reached[near] - reached[last]) / math.log2(last / near), 0.5)
    octaves = 1.1 * (reached[last] - wanted) / slope  # a little too far, for a step on the other side
    return min(max(round(last * 2.0 ** min(max(octaves, -3.0), 3.0)), finest), _COARSEST)


def _finest_of_size(
    compress: Callable[[int], CompressedImage], limit: int, first: int, finest: int
) -> tuple[CompressedImage | None, int]:
    """Return the file of the finest step that has up to `limit` bytes, searched from `first`, and the smallest size."""
    best: CompressedImage | None = None
    sizes: list[int] = []

    def excess(step: int) -> float:
        nonlocal best
        try:
            file = compress(step)
        except UserError:  # finer than a stream can hold
            return math.inf
        sizes.append(len(file.data))
        if sizes[-1] <= limit and (best is None or step < best.quantized.step):
            best = file
        return math.log2(sizes[-1]) - math.log2(max(limit, 1))

    _find_root(excess, first, finest, limit=_COARSEST)
    return best, min(sizes)


def _find_root(excess: Callable[[int], float], first: int, finest: int, *, limit: int) -> None:
    """Evaluate a function that falls with the step at steps ever closer to the one where it stops being positive.

    First come `first` and, if the root lies on its side, the end `limit`; the search stops if the root lies beyond that
    end. Each further step is where a line through the values on both sides crosses zero, over the logarithm of the
    step. The value of a side that stays in place is halved (the Illinois rule: Dowell & Jarratt 1971), and the bracket
    shrinks by a fifth at least, because sizes have plateaus and jumps. Ends when the sides are within 1/512.
    """
    known = {first: excess(first)}
    if (known[first] > 0) == (limit > first):
        known[limit] = excess(limit)
        if (known[limit] > 0) == (known[first] > 0):
            return
    low = max((s for s, value in known.items() if value > 0), default=finest - 1)
    high = min((s for s, value in known.items() if value <= 0), default=_COARSEST + 1)
    above, below = known.get(low, math.inf), known.get(high, -math.inf)
    moved = 0
    while high - low > max(1, low // 512):
        share = above / (above - below) if math.isfinite(above - below) else 0.5
        step = round(low * (high / low) ** min(max(share, 0.2), 0.8))
        step = min(max(step, low + 1), high - 1)
        value = excess(step)
        if value > 0:
            low, above, below = step, value, below / 2 if moved > 0 else below
        else:
            high, below, above = step, value, above / 2 if moved < 0 else above
        moved = 1 if value > 0 else -1
