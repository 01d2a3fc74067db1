"""Rate control: the quantiser's step by which one image keeps to a size or to a quality."""

import dataclasses
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
"""No finer step is tried for the sake of PSNR: what is lost beyond it the networks lose, not the quantiser."""

_FINEST, _COARSEST = step_code(MIN_STEP), step_code(MAX_STEP)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """How much of an image to keep: a step, a size or a quality; 1 is the step if nothing is said."""

    step: float | None = None
    bpp: float | None = None
    """Bits of the whole file per pixel of the image, at most."""
    psnr: float | None = None
    """Of the decoded image against the original in dB, at least."""
    max_bytes: int | None = None
    """Of the whole file. It comes before the others: where they ask for more, the image is coded more coarsely."""

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
        """The stored step of every image, where it needs no search."""
        if self.bpp is None and self.psnr is None and self.max_bytes is None:
            return step_code(self.step or 1.0)
        return None


Scale = Callable[[int], Scaled]
"""What one image has to be coded at a stored step; raises `UserError` as `StreamCodec.scale` does."""


def choose(
    codec: StreamCodec, scale: Scale, geometry: Geometry, pixels: torch.Tensor, rate: Rate, tile: int
) -> CompressedImage:
    """One image's stream as `rate` asks, from what is coded at each step and its pixels (3, height, width) uint8.

    Bits per pixel and bytes are those of the whole file, header included; no file found exceeds them. The search is
    exact to 1/512 of the step. Size is not strictly monotone in the step: of the files that were tried the one with
    the finest step that fits is taken. PSNR is measured on what `decode` would write, with the same `tile`. Raises
    `UserError`, with the best that can be had, if the image cannot be coded so.
    """
    scale(_COARSEST)  # raises for what no step can hold
    if rate.psnr is not None:
        first = finest = _coarsest_of_quality(codec, scale, geometry, pixels, rate.psnr, tile)
    elif rate.bpp is not None:
        first, finest = STEP_ONE, _FINEST
    else:
        first = finest = step_code(rate.step or 1.0)
    limits = [] if rate.max_bytes is None else [rate.max_bytes]
    if rate.bpp is not None:
        limits.append(int(rate.bpp * geometry.width * geometry.height / 8))
    if not limits:
        return codec.compress([(scale(first), geometry)])[0]
    return _finest_of_size(codec, scale, geometry, min(limits), first, finest)


def _finest_of_size(
    codec: StreamCodec, scale: Scale, geometry: Geometry, limit: int, first: int, finest: int
) -> CompressedImage:
    """The finest step, `finest` at most, whose file has up to `limit` bytes; `first` is where the search begins."""
    best: CompressedImage | None = None
    smallest = math.inf

    def excess(step: int) -> float:
        nonlocal best, smallest
        try:
            scaled = scale(step)
        except UserError:  # too fine for what a stream can hold
            return math.inf
        (coded,) = codec.compress([(scaled, geometry)])
        size = len(coded.data)
        smallest = min(smallest, size)
        if size <= limit and (best is None or step < best.quantized.step):
            best = coded
        return math.log2(size) - math.log2(max(limit, 1))

    known = {first: excess(first)}
    if known[first] > 0:
        known[_COARSEST] = excess(_COARSEST)
    if best is not None:
        _close_in(excess, known, finest, _COARSEST)
        return best
    pixels = geometry.width * geometry.height
    raise UserError(
        f"no step makes the file as small as {limit} bytes ({8 * limit / pixels:.3f} bits per pixel); the smallest has "
        f"{smallest} bytes ({8 * smallest / pixels:.3f}): allow at least that"
    )


def _coarsest_of_quality(
    codec: StreamCodec, scale: Scale, geometry: Geometry, pixels: torch.Tensor, target: float, tile: int
) -> int:
    """The coarsest step at which the decoded image comes up to `target` dB."""
    original = as_shown(pixels, geometry)[None]
    best = -math.inf
    good: list[int] = []

    def excess(step: int) -> float:
        nonlocal best
        try:
            scaled = scale(step)
        except UserError:  # too fine for what a stream can hold
            return math.inf
        z = codec.dequantize(codec.quantize(scaled))
        with torch.inference_mode():
            decoded = decode_uint8(codec.codec, z[None], tile)[0]
        reached = psnr(as_shown(crop(decoded, geometry), geometry)[None], original).item()
        best = max(best, reached)
        if reached >= target:
            good.append(step)
        return reached - target if reached != target else math.ulp(target)  # reaching it is enough: go coarser

    finest = step_code(FINEST_FOR_PSNR)
    known = {STEP_ONE: excess(STEP_ONE)}
    if known[STEP_ONE] <= 0:
        known[finest] = excess(finest)
    if max(known.values()) > 0:
        _close_in(excess, known, finest, _COARSEST)
    if not good:
        raise UserError(f"no step brings the decoded image to {target:g} dB; the best reached is {best:.2f} dB")
    return max(good)


def _close_in(excess: Callable[[int], float], known: dict[int, float], finest: int, coarsest: int) -> None:
    """Evaluate a function that falls with the step at steps ever closer to where it stops being positive.

    Between steps on either side of it the next is where a line through their values crosses zero, in the logarithm of
    the step; the value of a side that stays put is halved (the Illinois rule: Dowell & Jarratt 1971), and at least a
    fifth of the way is gone, for sizes have plateaus and jumps. Ends when the sides are neighbours, to 1/512.
    """
    low = max((s for s, value in known.items() if value > 0), default=finest - 1)
    high = min((s for s, value in known.items() if value <= 0), default=coarsest + 1)
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
