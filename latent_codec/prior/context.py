"""Predict each latent from those already decoded, by networks of integers: the context prior.

Channels form groups, strongest first. A group is decoded in two passes, one per colour of a checkerboard (He et al.
2021), or in more of them from a coarse grid to finer ones. Each pass has a small network that reads all known latents
and predicts the location and scale of every latent it decodes, both on integer grids. Each grid point has a frozen
frequency table.

All arithmetic is exact. Weights and activations are integers up to 127, multiplied as such where the device can. Where
it cannot, float64 represents every sum of products, whatever the order of addition and the precision that is set for
float32, and where a device has no float64, the CPU computes. Convolutions are written as matrix products, because a
library's convolution may use a transform that is not exact.
"""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from latent_codec.precision import float32_island, has_float64
from latent_codec.prior import integer_products
from latent_codec.prior.layout import PassLayout, Prediction, Sites, patches, strips
from latent_codec.prior.quantizer import LIMIT, BatchSettings
from latent_codec.prior.tables import Tables

TOP = 127
"""Largest magnitude of weights, inputs and activations."""

SIGNALS = 4
"""Input planes beside the channels: ones (0 outside the image), a checkerboard, the step, dither or not."""

INPUT_BITS = 36
"""Inputs are fine value * step * gain / 2^INPUT_BITS."""

UNIT = 32
"""The input that was 1 in the trained network's floating point."""

MAX_LEVELS = 6
"""Upper limit of how often a group's grid is coarsened."""

MAX_NESTED_GROUPS = 15
"""Upper limit of the groups of a nested prior, whose number a stream's header holds in four bits."""

_SCALES, _STEEP, _FRACTIONS = 89, 56, 8
"""Scales are 2^(i/8 - 5) steps for i < _SCALES. Below i = _STEEP each eighth of a step of the location has a table."""

TABLES = _STEEP * _FRACTIONS + _SCALES - _STEEP


def table_scale(table: int) -> tuple[float, float]:
    """Return the (location, scale) in quantiser steps of the logistic distribution that a table stands for."""
    if table < _STEEP * _FRACTIONS:
        return (table % _FRACTIONS - 4) / _FRACTIONS, 2.0 ** (table // _FRACTIONS / 8 - 5)
    return 0.0, 2.0 ** ((table - _STEEP * (_FRACTIONS - 1)) / 8 - 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Define the shape of a context prior."""

    groups: tuple[int, ...]
    """Number of channels in each group, in the order of decoding."""
    width: int
    """Features of each layer but the last."""
    centred: bool = False
    """Round latents to whole steps from the network's prediction instead of from 0."""
    levels: tuple[int, ...] = ()
    """Times that each group's grid is coarsened before its first pass, 0 to `MAX_LEVELS`; missing numbers are 0."""
    nested: bool = False
    """Let a stream hold the first few groups alone; the others' latents are 0. Channels are in the model's order."""

    def __post_init__(self) -> None:
        """Drop zeros at the end of `levels`, so that a prior has one configuration only."""
        used = max((i for i, n in enumerate(self.levels, 1) if n), default=0)
        object.__setattr__(self, "levels", tuple(self.levels[:used]))


class Layer(NamedTuple):
    """Compute y = (W x + b + 2^(s-1)) >> s row by row; W has the shape (out, in) or, for 3x3, (out, in * 9)."""

    weight: torch.Tensor  # int8
    bias: torch.Tensor  # (out,) int32
    shift: torch.Tensor  # (out,) int32, 1 to 20


PassNetwork = tuple[Layer, ...]
"""Predicts one pass by layers of 3x3, 3x3 and 1x1 with activations clipped to 0 .. 127, then 1x1."""


def pass_layouts(config: ContextConfig) -> list[PassLayout]:
    """Return what each pass decodes, in order."""
    layouts: list[PassLayout] = []
    stop = 0
    for i, group in enumerate(config.groups):
        start, stop = stop, stop + group
        levels = config.levels[i] if i < len(config.levels) else 0
        first = [(Sites.ALL, levels)] if levels else [(Sites.EVEN, 0), (Sites.ODD, 0)]
        finer = [(sites, n) for n in reversed(range(levels)) for sites in (Sites.CENTRES, Sites.ODD)]
        layouts += [PassLayout(start, stop, sites, 2**n) for sites, n in [*first, *finer]]
    return layouts


class ContextPrior:
    """Predict latents by frozen networks of integers.

    order: (z,) channels, strongest first; gain: (z,) 1 to 2^15, which scales a channel's latents to network inputs;
    width_offset: (z,) eighths of an octave between the network's unit of scale and a step of the channel. Raises
    `ValueError` if an array has another shape or could make a sum inexact.
    """

    kind: Literal["context"] = "context"
    limits = (-LIMIT, LIMIT)  # the least and the largest integer that a stream may hold

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
        self.dtype: torch.dtype | None = None
        """Floating point of the networks; None: integers, or float64 where a device does not multiply them."""
        self._layers: dict[tuple[int, str, torch.dtype | None], list[_Product]] = {}
        self.max_positions = 2**15
        """Positions that a network computes at once, which bounds its memory."""
        _check(self)

    @property
    def version(self) -> int:
        """Return the format version of the streams coded under this prior."""
        return 4 if self.config.nested else 3 if self.config.levels else 2 if self.config.centred else 1

    @property
    def ends(self) -> list[int]:
        """Return the number of channels in the first groups, for each number of groups from none to all."""
        return [0, *itertools.accumulate(self.config.groups)]

    def predict(self, number: int, known: np.ndarray, batch: BatchSettings, device: str) -> Prediction:
        """Predict the values of pass `number` for images of one shape from `known`, (b, z, h, w) int64, the fine values
        of all earlier passes and 0 elsewhere."""
        layout = self.layouts[number]
        channels = self.order[layout.start : layout.stop]
        located, wide = np.split(self._outputs(number, known, batch, device), 2, axis=1)  # (b, g, n) each
        offset = layout.take(batch.dithers, self.order)
        # The network locates a value in eighths of an input's unit, of which scale / 2^19 make one step. This is the
        # location in eighths of a step, less the dither, rounded.
        scale = (batch.steps[:, None] * self.gain[channels])[:, :, None]  # (b, g, 1), below 2^31
        eighths = (located * 2**36 - 8 * offset * scale + scale * 2**16) // (scale * 2**17)
        eighths = np.clip(eighths, -8 * LIMIT, 8 * LIMIT)
        if self.config.centred:
            rounded = ~batch.dithered[:, None, None]
            offset, eighths = np.where(rounded, eighths * 2**14, offset), np.where(rounded, 0, eighths)
        centre = (eighths + 4) >> 3
        width = wide - batch.octaves[:, None, None] + self.width_offset[channels][:, None]
        width = np.clip(width, 0, _SCALES - 1)
        steep = width * _FRACTIONS + eighths - 8 * centre + 4
        return Prediction(offset, centre, np.where(width < _STEEP, steep, width + _STEEP * (_FRACTIONS - 1)))

    def _inputs(self, layout: PassLayout, known: np.ndarray, batch: BatchSettings) -> np.ndarray:
        """Return what the network of a pass reads, (b, layout.inputs + SIGNALS, h, w) int64 of the layout's view."""
        known = known[:, :, :: layout.view, :: layout.view]
        b, _, h, w = known.shape
        channels = self.order[: layout.inputs]
        # Below 2^31, so that a product is below 2^62.
        scale = batch.steps[:, None, None, None] * self.gain[channels][:, None, None]
        x = np.zeros((b, layout.inputs + SIGNALS, h, w), np.int64)
        x[:, : layout.inputs] = (known[:, channels] * scale + 2 ** (INPUT_BITS - 1)) >> INPUT_BITS
        x[:, -4] = UNIT
        x[:, -3] = UNIT * Sites.EVEN.mask((h, w))
        x[:, -2] = 4 * batch.octaves[:, None, None]
        x[:, -1] = UNIT * batch.dithered[:, None, None]
        return np.clip(x, -TOP, TOP)

    def _products(self, number: int, device: str) -> list["_Product"]:
        """Return a pass' layers prepared for a device, once."""
        dtype = self.dtype
        if dtype is None and not integer_products.are_exact(device):
            dtype = torch.float64  # which no setting makes less precise
        if (key := (number, device, dtype)) not in self._layers:
            layers = zip(self.networks[number], (9, 9, 1, 1), strict=True)
            self._layers[key] = [_Product(layer, taps, device, dtype) for layer, taps in layers]
        return self._layers[key]

    def _outputs(self, number: int, known: np.ndarray, batch: BatchSettings, device: str) -> np.ndarray:
        """Return the network's outputs (b, 2g, n) int64 at the pass' n positions, in strips of rows with their margins.
        Features lie last, so that a neighbourhood is nine runs of memory."""
        layout = self.layouts[number]
        x = torch.from_numpy(self._inputs(layout, known, batch)).movedim(1, 3)  # (b, h, w, c)
        sites = torch.from_numpy(layout.mask(known.shape[2:])[:: layout.view, :: layout.view])
        device = device if has_float64(device) else "cpu"
        layers = self._products(number, device)
        (b, h, w), outputs = x.shape[:3], []
        x = pad(x.to(device, layers[0].weight.dtype), (0, 0, 1, 1, 1, 1))  # (b, h + 2, w + 2, c)
        with float32_island(x), torch.inference_mode():
            for top, bottom in strips((b, h, w), self.max_positions):
                first, last = max(top - 1, 0), min(bottom + 1, h)  # rows of layer 0 that layer 1 reads
                y = layers[0].activate(patches(x[:, first : last + 2]))
                y = pad(y.unflatten(1, (-1, w)), (0, 0, 1, 1, int(top == 0), int(bottom == h)))
                y = layers[1].activate(patches(y, sites[top:bottom]))  # (b, n, width)
                y = layers[2].activate(y)
                outputs.append(layers[3](y).cpu().to(torch.int64))
        return torch.cat(outputs, 1).movedim(2, 1).numpy()


class _Product:
    """Applies a layer to (b, n, in) of its weights' type; every operation is exact."""

    def __init__(self, layer: Layer, taps: int, device: str, dtype: torch.dtype | None) -> None:
        """Prepare the weights for a device, in floating point or, with None, as integers."""
        weight = layer.weight.unflatten(1, (-1, taps)).permute(2, 1, 0).flatten(0, 1)  # (taps * in, out)
        self.out, self.is_integer = weight.shape[1], dtype is None
        divisor = 2 ** layer.shift.to(torch.int64)  # as integers: a device's `exp2` need not be exact
        offset = layer.bias + divisor // 2
        if dtype is None:
            self.weight = integer_products.padded(weight.to(device))
            self._offset, self._last = offset.to(device, torch.int32), layer.shift.to(device, torch.int32)
        else:
            self.weight = weight.to(device, dtype)
            self._offset, self._last = offset.to(device, dtype), divisor.to(device, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs (b, n, out), as int32 or in floating point."""
        if self.is_integer:
            y = integer_products.multiply(x.flatten(0, 1), self.weight)[:, : self.out]
            return ((y + self._offset) >> self._last).unflatten(0, x.shape[:2])
        return (x @ self.weight).add_(self._offset).div_(self._last).floor_()

    def activate(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs clipped to 0 .. 127, in the weights' type."""
        return self(x).clamp_(0, TOP).to(self.weight.dtype)


def _check(prior: ContextPrior) -> None:
    z, groups, levels, width = prior.channels, prior.config.groups, prior.config.levels, prior.config.width
    if min(groups, default=0) < 1 or width < 1:
        raise ValueError(f"a context prior cannot have groups {groups} and width {width}; all must be 1 or more")
    if len(levels) > len(groups) or not all(0 <= n <= MAX_LEVELS for n in levels):
        raise ValueError(f"levels {levels} do not fit {len(groups)} groups; each must be 0 to {MAX_LEVELS}")
    if levels and not prior.config.centred:
        raise ValueError("a context prior with levels must be centred")
    if prior.config.nested and not (prior.config.centred and len(groups) <= MAX_NESTED_GROUPS):
        raise ValueError(f"a nested prior must be centred with up to {MAX_NESTED_GROUPS} groups, not {len(groups)}")
    if prior.config.nested and prior.order.tolist() != list(range(z)):
        raise ValueError("a nested prior's channels must be in the model's order")
    if prior.order.shape != (z,) or sorted(prior.order.tolist()) != list(range(z)):
        raise ValueError(f"the order of {z} channels cannot be {prior.order.tolist()}")
    if prior.gain.shape != (z,) or prior.gain.min() < 1 or prior.gain.max() > 2**15 or prior.width_offset.shape != (z,):
        raise ValueError(f"gains and width offsets must be {z} each, with gains from 1 to {2**15}")
    if len(prior.tables) != TABLES:
        raise ValueError(f"a context prior has {TABLES} tables, not {len(prior.tables)}")
    if len(prior.networks) != len(prior.layouts):
        raise ValueError(f"{len(prior.layouts)} passes need as many networks, not {len(prior.networks)}")
    for layout, network in zip(prior.layouts, prior.networks, strict=True):
        inputs = (layout.inputs + SIGNALS) * 9, width * 9, width, width
        outputs = width, width, width, 2 * (layout.stop - layout.start)
        for layer, *shape in zip(network, outputs, inputs, strict=True):
            _check_layer(layer, tuple(shape))


def _check_layer(layer: Layer, shape: tuple[int, ...]) -> None:
    weight, bias, shift = (t.to(torch.int64) for t in layer)
    if weight.shape != shape or bias.shape != shape[:1] or shift.shape != shape[:1]:
        raise ValueError(f"a context layer has shape {tuple(weight.shape)}, not {shape}")
    if shift.min() < 1 or shift.max() > 20:
        raise ValueError(f"a context layer shifts by {int(shift.min())} to {int(shift.max())} bits, not by 1 to 20")
    largest = TOP * weight.abs().sum(1) + bias.abs() + 2 ** (shift - 1)
    if largest.max() >= 2**24:
        raise ValueError("a context layer's sums can exceed 2^24, so they would not be exact")
