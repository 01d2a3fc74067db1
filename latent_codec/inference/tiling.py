"""Run large images through networks in tiles, so that memory beside input and output is that of one tile.

Where a backbone's receptive field is finite, a tile is read with the margin that it needs and cropped to its own part:
the result is the untiled one, but for rounding, as libraries choose the order of sums by shape. Where the receptive
field is the whole image, tiles overlap and are blended with linear ramps, and the change can be measured.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.images.geometry import in_channels, in_rgb
from latent_codec.metrics.distortion import psnr
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian, Posterior

# 2.4 megapixels: lite takes 0.2 GB for them, and the decoder of Stable Diffusion's shape, at 3 KB a pixel, 7 GB.
DEFAULT_SIDE = 1536

_Map = Callable[[torch.Tensor], torch.Tensor]

_LEAST_BLENDED = 8  # latent elements a side: a quarter of a tile is shared with each neighbour


def cuts(pixels: int, tile: int | None) -> bool:
    """Return whether an image of so many pixels is cut: if it has more than a tile of side `tile`; None never cuts."""
    return tile is not None and pixels > tile * tile


def is_exact(codec: Codec) -> bool:
    """Return whether tiles leave a model's results as they are, to rounding."""
    return codec.backbone.encoder_margin is not None and codec.backbone.decoder_margin is not None


def least_tile(codec: Codec) -> int:
    """Return the smallest side of a tile, in pixels, that has a part of its own between its margins."""
    margins = codec.backbone.encoder_margin, codec.backbone.decoder_margin
    return codec.factor * max(_LEAST_BLENDED if m is None else 2 * m + 1 for m in margins)


def default_tile(codec: Codec) -> int:
    """Return the side in pixels, near `DEFAULT_SIDE`, that a model's tiles have by default."""
    return max(DEFAULT_SIDE // codec.factor * codec.factor, least_tile(codec))


def check_tile(codec: Codec, tile: int) -> None:
    """Raise `UserError` if a model cannot have tiles of that side."""
    least, factor = least_tile(codec), codec.factor
    if tile < least:
        raise UserError(f"--tile {tile} is too small for this model, whose tiles overlap; give at least {least}")
    if tile % factor:
        below = tile // factor * factor
        raise UserError(f"--tile {tile} is no multiple of the model's {factor}; give {below} or {below + factor}")


def encode(codec: Codec, pixels: torch.Tensor, tile: int | None, labels: torch.Tensor | None = None) -> Posterior:
    """Return the posterior, on the CPU, of pixels (b, c, h, w) on any device; pixels and labels are `Codec.encode`'s.

    A model of grey images also takes uint8 RGB. `tile` is the side, in pixels, of what the network sees at once of a
    larger image, margins included; None is no limit. Only a tile is moved to the network's device. The caller enters
    autocast. Raises `UserError` for a tile that the model cannot have, `ValueError` as `Codec.encode` does.
    """
    if pixels.dtype == torch.uint8 and codec.config.image_channels == 1:
        pixels = in_channels(pixels, 1)
    codec.check_pixels(pixels)
    return _encode(codec, pixels, _tile_for(codec, pixels[0, 0].numel(), tile), labels)


def decode_uint8(codec: Codec, z: torch.Tensor, tile: int | None, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Decode latents (b, z, h/f, w/f) to uint8 pixels (b, 3, h, w) on the CPU; the rest is as for `encode`.
    Raises `UserError` too if the decoder's output is not finite, as `decode` does."""
    tile = _tile_for(codec, z[0, 0].numel() * codec.factor**2, tile)
    return in_rgb(_decode(codec, z, tile, labels, codec.likelihood.to_uint8))


def decode(codec: Codec, z: torch.Tensor, tile: int | None, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Decode latents to expected pixels (b, c, h, w), float32 in the likelihood's range, not clipped."""
    return _decode(codec, z, _tile_for(codec, z[0, 0].numel() * codec.factor**2, tile), labels, torch.Tensor.float)


def _tile_for(codec: Codec, pixels: int, tile: int | None) -> int | None:
    """Return the tile for an image of so many pixels, None if it stays whole."""
    if tile is not None:
        check_tile(codec, tile)
    return tile if cuts(pixels, tile) else None


def nll_gradient(codec: Codec, z: torch.Tensor, pixels: torch.Tensor, tile: int | None) -> tuple[float, torch.Tensor]:
    """Return -log p(x | z) in nats and its gradient with respect to one image's latents (z, h, w), on the CPU.

    pixels: (3, height, width) uint8, without padding. The model's parameters get no gradient. Each tile contributes the
    likelihood of its own part; where the receptive field is the whole image, that is an estimate.
    """
    pixels = in_channels(pixels, codec.config.image_channels)
    factor, margin, device = codec.factor, codec.backbone.decoder_margin, _device(codec)
    side = tile // factor if tile is not None and cuts(z[0].numel() * factor**2, tile) else max(z.shape[1:])
    shared = side // 8 if margin is None else margin
    total, gradient = 0.0, torch.zeros_like(z)
    rows, columns = tile_spans(z.shape[1], side, shared), tile_spans(z.shape[2], side, shared)
    for row, column in ((row, column) for row in rows for column in columns):
        part = z[None, :, row.read(1), column.read(1)].to(device).requires_grad_()
        own = pixels[None, :, row.first * factor : row.last * factor, column.first * factor : column.last * factor]
        x = codec.likelihood.from_uint8(own.to(device))
        with torch.enable_grad():
            params = codec.likelihood_params(part)[..., row.own(factor), column.own(factor)]
            params = params[..., : x.shape[2], : x.shape[3]]  # without the padding
            nll = -codec.likelihood.log_prob(params, x).sum()
            (found,) = torch.autograd.grad(nll, part)
        total += nll.item()
        gradient[:, row.read(1), column.read(1)] += found[0].float().cpu()
    return total, gradient


def _device(codec: Codec) -> torch.device:
    return next(codec.parameters()).device


class TileSpan(NamedTuple):
    """Describe a tile along an axis, in latent elements: it reads [start, stop), and [first, last) is its own part."""

    start: int
    stop: int
    first: int
    last: int

    def read(self, scale: int) -> slice:
        """Return what the tile reads of a tensor with `scale` elements for each latent element."""
        return slice(self.start * scale, self.stop * scale)

    def own(self, scale: int) -> slice:
        """Return the tile's own part of what was made of the tile."""
        return slice((self.first - self.start) * scale, (self.last - self.start) * scale)


def tile_spans(size: int, side: int, margin: int) -> list[TileSpan]:
    """Cut [0, size) into own parts of tiles of up to `side` > 2 * `margin`, which they read beyond inner edges."""
    if size <= side:
        return [TileSpan(0, size, 0, size)]
    inner = size - 2 * margin  # what is shared out: the outermost tiles own their outer margins as well
    count = -(-inner // (side - 2 * margin))
    edges = [inner * i // count for i in range(count + 1)]
    return [
        TileSpan(a, b + 2 * margin, a + margin if a > 0 else 0, b + margin if b < inner else size)
        for a, b in pairwise(edges)
    ]


class _Direction(NamedTuple):
    """Hold one of a codec's two networks, and what is done to its output element by element."""

    network: _Map
    finish: _Map
    scale_in: int
    """Elements of the input along a side for each latent element."""
    scale_out: int
    margin: int | None


def _encode(codec: Codec, pixels: torch.Tensor, tile: int | None, labels: torch.Tensor | None) -> Posterior:
    if tile is None:
        return codec.encode(pixels.to(_device(codec)), labels).cpu()
    # What is blended is the network's output, means and log-variances, and clamped once: the result estimates what the
    # network would say of the whole. Blending variances would differ by (difference of the log-variances)^2 / 8.
    network = partial(codec.features, labels=labels)
    direction = _Direction(network, torch.Tensor.float, codec.factor, 1, codec.backbone.encoder_margin)
    features = _tiled(direction, pixels, tile // codec.factor, _device(codec))  # (b, features * z, h/f, w/f)
    return codec.bottleneck(features)  # works wherever its input is


def _decode(
    codec: Codec, z: torch.Tensor, tile: int | None, labels: torch.Tensor | None, convert: _Map
) -> torch.Tensor:
    def finish(params: torch.Tensor) -> torch.Tensor:
        return convert(codec.likelihood.checked_mean(params))

    network = partial(codec.likelihood_params, labels=labels)
    if tile is None:
        return finish(network(z.to(_device(codec)))).cpu()
    direction = _Direction(network, finish, 1, codec.factor, codec.backbone.decoder_margin)
    return _tiled(direction, z, tile // codec.factor, _device(codec))


def _tiled(direction: _Direction, x: torch.Tensor, side: int, device: torch.device) -> torch.Tensor:
    """Return finish(network(x)) on the CPU from tiles of `side` latent elements."""
    network, finish, scale_in, scale_out, margin = direction
    height, width = (size // scale_in for size in x.shape[2:])
    shared = side // 8 if margin is None else margin
    rows, columns = tile_spans(height, side, shared), tile_spans(width, side, shared)

    def output(row: TileSpan, column: TileSpan) -> torch.Tensor:
        return network(x[..., row.read(scale_in), column.read(scale_in)].to(device))

    def own(row: TileSpan, column: TileSpan) -> torch.Tensor:
        return finish(output(row, column)[..., row.own(scale_out), column.own(scale_out)]).cpu()

    if margin is not None:
        return torch.cat([torch.cat([own(row, column) for column in columns], 3) for row in rows], 2)
    overlap = 2 * shared * scale_out
    strips = (
        torch.cat(list(blended((output(row, column).float().cpu() for column in columns), overlap, 3)), 3)
        for row in rows
    )
    return torch.cat([finish(strip.to(device)).cpu() for strip in blended(strips, overlap, 2)], 2)


def blended(parts: Iterable[torch.Tensor], overlap: int, dim: int) -> Iterator[torch.Tensor]:
    """Blend parts of which each shares `overlap` elements along `dim` with the next, and yield them without overlap.

    Weights go over along a line. A part with neighbours is at least twice as long as the overlap.
    """
    ramp = ((torch.arange(overlap) + 0.5) / overlap).view(-1, *[1] * (3 - dim))
    tail: torch.Tensor | None = None
    for part in parts:
        if tail is not None:
            head, rest = part.tensor_split([overlap], dim)
            part = torch.cat([torch.lerp(tail, head, ramp), rest], dim)
        body, tail = part.tensor_split([max(part.shape[dim] - overlap, 0)], dim)
        yield body
    if tail is not None:
        yield tail


class EncodeDifference(NamedTuple):
    """Measure how tiles change an encoded image, and the image that is decoded in tiles from it."""

    largest: float
    """Largest difference of the means, in standard deviations of the untiled posterior if it has any."""
    rms: float
    psnr_whole: float
    """PSNR in dB of the image that is encoded and decoded whole."""
    psnr_tiled: float

    def __str__(self) -> str:
        return (
            f"means differ by up to {self.largest:.3g} standard deviations of the posterior (rms {self.rms:.3g}), and "
            f"the decoded pixels have {self.psnr_tiled:.3f} instead of {self.psnr_whole:.3f} dB PSNR"
        )


class DecodeDifference(NamedTuple):
    """Measure how tiles change decoded pixels."""

    largest: int
    """Largest difference in grey levels."""
    psnr: float
    """PSNR in dB of the pixels decoded in tiles against those decoded whole."""

    def __str__(self) -> str:
        return f"decoded pixels differ by up to {self.largest} of 255 (PSNR between the two {self.psnr:.2f} dB)"


def encode_difference(
    codec: Codec, pixels: torch.Tensor, tile: int, labels: torch.Tensor | None = None
) -> EncodeDifference:
    """Compare tiles with the whole on pixels (b, c, h, w) uint8 that fit into memory, which are cut in any case."""
    pixels = in_channels(pixels, codec.config.image_channels)
    whole, tiled = (_encode(codec, pixels, side, labels) for side in (None, tile))
    difference = tiled.mean - whole.mean
    if isinstance(whole, DiagonalGaussian):
        difference = difference / whole.std
    convert = codec.likelihood.to_uint8
    return EncodeDifference(
        difference.abs().amax().item(),
        difference.square().mean().sqrt().item(),
        psnr(_decode(codec, whole.mean, None, labels, convert), pixels.cpu()).mean().item(),
        psnr(_decode(codec, tiled.mean, tile, labels, convert), pixels.cpu()).mean().item(),
    )


def decode_difference(codec: Codec, z: torch.Tensor, tile: int, labels: torch.Tensor | None = None) -> DecodeDifference:
    """Compare tiles with the whole on latents (b, z, h, w) whose image fits into memory, which are cut in any case."""
    whole, tiled = (_decode(codec, z, side, labels, codec.likelihood.to_uint8) for side in (None, tile))
    return DecodeDifference(int((whole.int() - tiled.int()).abs().amax()), psnr(tiled, whole).mean().item())


def middle_part(codec: Codec, height: int, width: int, tile: int) -> tuple[slice, slice]:
    """Return rows and columns, in latent elements, of a middle part two tiles long with as many elements as one."""
    side = tile // codec.factor
    length = min(max(height, width), 2 * side - 2 * (side // 8))
    breadth = min(height, width, side * side // length)
    sizes = (length, breadth) if height > width else (breadth, length)
    starts = ((whole - size) // 2 for whole, size in zip((height, width), sizes, strict=True))
    rows, columns = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    return rows, columns
