"""The context prior: a network of integers that reads what is decoded already and chooses a table for each symbol.

Channels fall into groups, strongest first; each group is decoded in two passes, the positions with even row + column,
then the others, or in more of them from a coarse grid to finer ones. One small network per pass sees all that is known
by then and says where each value lies and how wide its distribution is, both on integer grids. Every grid point has a
frozen frequency table.

All arithmetic is exact. Weights and activations are integers up to 127, so sums of products stay below 2^24 and float32
holds every one of them, in whatever order a machine adds. Convolutions are spelled out as matrix products, because a
library's convolution may go by a transform that is not exact. On devices other than the CPU float64 is used.
"""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from latent_codec.precision import float32_island
from latent_codec.prior.quantizer import LIMIT, octave_eighths
from latent_codec.prior.tables import Tables

TOP = 127
"""Largest magnitude of weights, inputs and activations."""

SIGNALS = 4
"""Input planes beside the channels: inside the image, positions of the first half, step, dither."""

INPUT_BITS = 36
"""Inputs are fine value * step * gain / 2^INPUT_BITS; 32 of them are 1 in the units the network was trained in."""

UNIT = 32

_STEEP, _WIDE, _FRACTIONS = 56, 89, 8
"""Scales 2^(i/8 - 5) for i < _WIDE; below i = _STEEP a location's eighths matter and each has a table of its own."""

TABLES = _STEEP * _FRACTIONS + _WIDE - _STEEP


def table_scale(table: int) -> tuple[float, float]:
    """(location, scale) of the logistic that a table stands for, in quantisation steps."""
    if table < _STEEP * _FRACTIONS:
        return (table % _FRACTIONS - 4) / _FRACTIONS, 2.0 ** (table // _FRACTIONS / 8 - 5)
    return 0.0, 2.0 ** ((table - _STEEP * (_FRACTIONS - 1)) / 8 - 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    groups: tuple[int, ...]
    """Channels of each group, in the order of decoding."""
    width: int
    """Features of each layer but the last."""
    centred: bool = False
    """Rounded latents lie whole steps from where the network expects them, rather than from 0."""
    levels: tuple[int, ...] = ()
    """How often each group's grid is coarsened before its first pass, 0 to `MAX_LEVELS`; groups without a number: 0."""

    def __post_init__(self) -> None:
        """Groups that are not coarsened at the end go without a number: a prior has one configuration."""
        levels = list(self.levels)
        while levels and levels[-1] == 0:
            levels.pop()
        object.__setattr__(self, "levels", tuple(levels))


class Layer(NamedTuple):
    """y = (W x + b + 2^(s-1)) >> s, row by row; W has the shape (out, in) or (out, in * 9)."""

    weight: torch.Tensor  # int8
    bias: torch.Tensor  # (out,) int32
    shift: torch.Tensor  # (out,) int32, 1 to 20


class PassNetwork(NamedTuple):
    """One network: 3x3, 3x3 and 1x1 with activations clipped to 0 .. 127, then 1x1."""

    layers: tuple[Layer, Layer, Layer, Layer]


MAX_LEVELS = 6


class Sites(enum.Enum):
    """Positions of a grid that one pass decodes, the grid's own rows and columns counted from 0."""

    EVEN = "row + column even"
    ODD = "row + column odd"
    ALL = "all"
    CENTRES = "row and column odd"


class PassLayout(NamedTuple):
    """What a pass decodes: channels start .. stop of the order, at sites of the grid of every `spacing`-th row and
    column."""

    start: int
    stop: int
    sites: Sites
    spacing: int = 1

    @property
    def inputs(self) -> int:
        """Channels that the pass' network reads: the group's own only if some of their positions are decoded."""
        return self.stop if self.sites in (Sites.ODD, Sites.CENTRES) else self.start

    @property
    def view(self) -> int:
        """Spacing of what the pass' network sees: the grid alone in the first group, which has nothing else to see."""
        return 1 if self.start else self.spacing

    def where(self, size: Sequence[int]) -> np.ndarray:
        """The pass' positions among all of a size (h, w), bool."""
        found = np.zeros(tuple(size), bool)
        grid = found[:: self.spacing, :: self.spacing]
        grid[:] = _at_sites(grid.shape, self.sites)
        return found


def pass_layouts(config: ContextConfig) -> list[PassLayout]:
    """The passes in order."""
    stops = np.cumsum(config.groups).tolist()
    found: list[PassLayout] = []
    for i, (stop, group) in enumerate(zip(stops, config.groups, strict=True)):
        levels = config.levels[i] if i < len(config.levels) else 0
        first = [(Sites.ALL, levels)] if levels else [(Sites.EVEN, 0), (Sites.ODD, 0)]
        finer = [(sites, n) for n in reversed(range(levels)) for sites in (Sites.CENTRES, Sites.ODD)]
        found += [PassLayout(stop - group, stop, sites, 2**n) for sites, n in [*first, *finer]]
    return found


class ContextPrior:
    """The frozen prior.

    order: (z,) channels, strongest first; gain: (z,) the network's units per channel, 1 to 2^15; width_offset: (z,)
    eighths of an octave between the network's unit of width and a step of the channel. Raises `ValueError` if anything
    has another shape, or could make a sum inexact.
    """

    kind: Literal["context"] = "context"

    @property
    def version(self) -> int:
        """Of the streams coded under it."""
        return 3 if self.config.levels else 2 if self.config.centred else 1

    def __init__(
        self,
        config: ContextConfig,
        order: np.ndarray,
        gain: np.ndarray,
        width_offset: np.ndarray,
        networks: list[PassNetwork],
        tables: Tables,
    ) -> None:
        self.config, self.networks, self.tables = config, networks, tables
        self.order, self.gain, self.width_offset = (np.asarray(a, np.int64) for a in (order, gain, width_offset))
        self.layouts = pass_layouts(config)
        self.channels = sum(config.groups)
        _check(self)

    def select(
        self, number: int, known: np.ndarray, dithers: np.ndarray, dithered: np.ndarray, steps: np.ndarray, device: str
    ) -> "Prediction":
        """What pass `number` decodes by, for images of one shape.

        known: (b, z, h, w) int64, the fine values (`Quantized.fine`) decoded so far, others 0; dithers: of the same
        shape; dithered: (b,) bool, without it an image's dithers are 0; steps: (b,) int64 as stored.
        """
        span = self.layouts[number]
        where = span.where(known.shape[2:])
        inputs = self._inputs(span, known, dithered, steps)  # (b, span.inputs + SIGNALS, h, w) of the span's view
        sites = torch.from_numpy(where[:: span.view, :: span.view])
        outputs = _run(self.networks[number], torch.from_numpy(inputs), sites, device)  # (b, 2g, n) int64
        located, wide = np.split(outputs, 2, axis=1)  # (b, g, n) each
        channels = self.order[span.start : span.stop]
        scale = (steps[:, None] * self.gain[channels])[:, :, None]  # (b, g, 1), below 2^31
        offset = dithers[:, channels][:, :, where]
        # Eighths of a step: located is in eighths of an input's unit, of which scale / 2^19 make one step.
        eighths = (located * 2**36 - 8 * offset * scale + scale * 2**16) // (scale * 2**17)
        eighths = np.clip(eighths, -8 * LIMIT, 8 * LIMIT)
        if self.config.centred:
            rounded = ~dithered[:, None, None]
            offset, eighths = np.where(rounded, eighths * 2**14, offset), np.where(rounded, 0, eighths)
        centre = (eighths + 4) >> 3
        octave = np.array([octave_eighths(int(s)) for s in steps])[:, None, None]
        width = np.clip(wide - octave + self.width_offset[channels][:, None], 0, _WIDE - 1)
        steep = width * _FRACTIONS + eighths - 8 * centre + 4
        return Prediction(offset, centre, np.where(width < _STEEP, steep, width + _STEEP * (_FRACTIONS - 1)))

    def _inputs(self, span: PassLayout, known: np.ndarray, dithered: np.ndarray, steps: np.ndarray) -> np.ndarray:
        known = known[:, :, :: span.view, :: span.view]
        b, _, h, w = known.shape
        channels = self.order[: span.inputs]
        scale = steps[:, None, None, None] * self.gain[channels][:, None, None]  # below 2^31; a product below 2^62
        x = np.zeros((b, span.inputs + SIGNALS, h, w), np.int64)
        x[:, : span.inputs] = (known[:, channels] * scale + 2 ** (INPUT_BITS - 1)) >> INPUT_BITS
        x[:, -4] = UNIT
        x[:, -3] = UNIT * _at_sites((h, w), Sites.EVEN)
        x[:, -2] = np.array([4 * octave_eighths(int(s)) for s in steps])[:, None, None]
        x[:, -1] = UNIT * dithered[:, None, None]
        return np.clip(x, -TOP, TOP)


class Prediction(NamedTuple):
    """For each value of a pass, in the order (channel, row, column): (b, g, n) int64 both."""

    offset: np.ndarray  # of fine values from whole steps
    centre: np.ndarray  # whole steps less this are what is coded
    table: np.ndarray


def _at_sites(size: Sequence[int], sites: Sites) -> np.ndarray:
    """Which positions of a grid of a size (h, w) these are, (h, w) bool."""
    row, column = np.arange(size[0])[:, None] % 2, np.arange(size[1]) % 2
    match sites:
        case Sites.EVEN:
            return row == column
        case Sites.ODD:
            return row != column
        case Sites.CENTRES:
            return (row & column).astype(bool)
        case Sites.ALL:
            return np.ones(tuple(size), bool)


_STRIP = 2**15  # positions that go through a network at once: what bounds its memory


def _run(net: PassNetwork, x: torch.Tensor, sites: torch.Tensor, device: str) -> np.ndarray:
    """The network's outputs (b, 2g, n) int64 at n sites, given as (h, w) bool, from inputs (b, c, h, w).

    By strips of rows, which see what they need of their neighbours: the result is the whole image's. Features lie last,
    so that a neighbourhood is nine runs of memory.
    """
    b, _, h, w = x.shape
    dtype = _dtype(device)
    layers = [_floats(layer, taps, device, dtype) for layer, taps in zip(net.layers, (9, 9, 1, 1), strict=True)]
    rows = max(1, _STRIP // (b * w))
    x = pad(x.movedim(1, 3).to(device, dtype), (0, 0, 1, 1, 1, 1))  # (b, h + 2, w + 2, c)
    outputs = []
    with float32_island(x), torch.inference_mode():
        for top in range(0, h, rows):
            bottom = min(top + rows, h)
            first, last = max(top - 1, 0), min(bottom + 1, h)  # rows of the first layer that the second one sees
            y = _apply(layers[0], patches(x[:, first : last + 2])).clamp_(0, TOP)
            y = pad(y.unflatten(1, (-1, w)), (0, 0, 1, 1, int(top == 0), int(bottom == h)))
            y = _apply(layers[1], patches(y, sites[top:bottom])).clamp_(0, TOP)  # (b, n, width)
            y = _apply(layers[2], y).clamp_(0, TOP)
            outputs.append(_apply(layers[3], y).cpu().to(torch.int64))
    return torch.cat(outputs, 1).movedim(2, 1).numpy()


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device.split(":")[0] == "cpu" else torch.float64


def _floats(layer: Layer, taps: int, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """A layer's weights (taps * in, out), what is added to its sums and what these are divided by, (out,) both.

    The powers of two are made as integers: a device's `exp2` need not be exact.
    """
    weight = layer.weight.unflatten(1, (-1, taps)).permute(2, 1, 0).flatten(0, 1)
    divisor = 2 ** layer.shift.to(torch.int64)
    return [t.to(device, dtype) for t in (weight, layer.bias + divisor // 2, divisor)]


def _apply(layer: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """(b, n, in) -> (b, n, out): integers held in floats, every operation exact."""
    weight, offset, divisor = layer
    return (x @ weight).add_(offset).div_(divisor).floor_()


def patches(x: torch.Tensor, sites: torch.Tensor | None = None) -> torch.Tensor:
    """3x3 neighbourhoods (b, n, 9 * c) of padded x (b, h + 2, w + 2, c), at sites (h, w) bool or everywhere."""
    h, w = x.shape[1] - 2, x.shape[2] - 2
    corner = torch.arange(h)[:, None] * (w + 2) + torch.arange(w)  # (h, w) of each position's upper left neighbour
    if sites is not None:
        corner = corner[sites]
    shift = torch.arange(3)[:, None] * (w + 2) + torch.arange(3)  # (3, 3)
    index = (corner.reshape(-1, 1) + shift.reshape(1, -1)).reshape(-1).to(x.device)  # (n * 9,)
    return x.flatten(1, 2).index_select(1, index).unflatten(1, (-1, 9)).flatten(2)


def _check(prior: ContextPrior) -> None:
    z, width = prior.channels, prior.config.width
    if min(prior.config.groups, default=0) < 1 or width < 1:
        raise ValueError(f"context prior of groups {prior.config.groups} and width {width}")
    levels = prior.config.levels
    if len(levels) > len(prior.config.groups) or not all(0 <= n <= MAX_LEVELS for n in levels):
        raise ValueError(f"levels {levels} of {len(prior.config.groups)} groups; each may be 0 to {MAX_LEVELS}")
    if levels and not prior.config.centred:
        raise ValueError("a context prior with levels has to be centred")
    if prior.order.shape != (z,) or sorted(prior.order.tolist()) != list(range(z)):
        raise ValueError(f"the order of {z} channels is {prior.order.tolist()}")
    if prior.gain.shape != (z,) or prior.gain.min() < 1 or prior.gain.max() > 2**15 or prior.width_offset.shape != (z,):
        raise ValueError(f"gains and width offsets of {z} channels do not fit")
    if len(prior.tables) != TABLES:
        raise ValueError(f"{len(prior.tables)} tables, not {TABLES}")
    if len(prior.networks) != len(prior.layouts):
        raise ValueError(f"{len(prior.networks)} networks for {len(prior.layouts)} passes")
    for span, net in zip(prior.layouts, prior.networks, strict=True):
        sizes = [(span.inputs + SIGNALS) * 9, width * 9, width, width], [*[width] * 3, 2 * (span.stop - span.start)]
        for layer, inputs, outputs in zip(net.layers, *sizes, strict=True):
            _check_layer(layer, inputs, outputs)


def _check_layer(layer: Layer, inputs: int, outputs: int) -> None:
    weight, bias, shift = (t.to(torch.int64) for t in layer)
    if weight.shape != (outputs, inputs) or bias.shape != (outputs,) or shift.shape != (outputs,):
        raise ValueError(f"a context layer has shape {tuple(weight.shape)}, not {(outputs, inputs)}")
    if shift.min() < 1 or shift.max() > 20:
        raise ValueError("a context layer shifts by less than 1 or more than 20 bits")
    largest = TOP * weight.abs().sum(1) + bias.abs() + 2 ** (shift - 1)
    if largest.max() >= 2**24:
        raise ValueError("a context layer's sums can exceed 2^24, so they would not be exact")
