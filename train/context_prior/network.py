"""Train the passes of the context prior in floating point, then freeze them to integers."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, logsigmoid, pad

from latent_codec.model.file import LatentStatistics
from latent_codec.noise import fold, hashes, uniform
from latent_codec.precision import float32_island, has_float64
from latent_codec.prior import context
from latent_codec.prior.context import SIGNALS, TABLES, TOP, UNIT
from latent_codec.prior.error_feedback import REACH, WEIGHT_BITS, Feedback
from latent_codec.prior.layout import PassLayout, Sites
from latent_codec.prior.quantizer import BITS_OF_ERROR, LIMIT, STEP_OF_STD, STEP_ONE, Scaled, round_with_dead_zone
from latent_codec.prior.tables import Tables, join, normalize

_HIDDEN = 16  # integers per unit of an activation
_LOCATED, _WIDE = 8 * UNIT, 8  # integers per unit of the last layer's two outputs
_RANGE = 4.0  # standard deviations of a channel that an input can represent
_MOST_GAIN = 2**14
_STEP, _DITHERED, _NOISE = range(3)  # numbers that a sample's key is folded with


class Drawn(NamedTuple):
    """Hold latents to be coded, with channels in the prior's order."""

    scaled: torch.Tensor  # (b, z, h, w) in steps
    dither: torch.Tensor  # (b, z, h, w) in steps, 0 where there is none
    step: torch.Tensor  # (b,) as stored
    dithered: torch.Tensor  # (b,) bool
    seeds: torch.Tensor  # (b,) int64, of the dither
    exact: bool = False  # latents already hold noise and are not rounded


class Coded(NamedTuple):
    """Hold the cost and the values of coded latents."""

    channel_bits: torch.Tensor  # (b, z) bits per latent position of each image's channels
    latents: torch.Tensor  # (b, z, h, w) as a decoder reads them; both in the model's order of channels

    @property
    def bits(self) -> torch.Tensor:
        """Return the bits per latent position of each image, (b,)."""
        return self.channel_bits.sum(1)


class ContextNet(nn.Module):
    """Compute the bits of quantised latents under the context prior, in floating point."""

    channel_steps: torch.Tensor
    gain: torch.Tensor
    channels: torch.Tensor  # `order` on the device; checkpoints hold it, for runs that start from the weights
    inverse: torch.Tensor  # of `channels`
    equal_noise: torch.Tensor  # (z,) in the model's order: step at which a channel's noise is as large as its spread
    feedback: torch.Tensor | None  # weights (z, z, 3, 3) of errors in steps, in the prior's order

    def __init__(
        self,
        config: context.ContextConfig,
        channel_steps: np.ndarray,
        statistics: LatentStatistics,
        order: np.ndarray | None = None,
    ) -> None:
        """Draw random weights for a quantiser with these channel steps (z,). `order` (z,) lists one group's channels
        after the other's, by default those with most bits first. Raises `ValueError` if the groups do not add up."""
        super().__init__()
        if sum(config.groups) != len(channel_steps):
            raise ValueError(
                f"groups {config.groups} do not add up to the model's {len(channel_steps)} latent channels"
            )
        self.config, self.layouts = config, context.pass_layouts(config)
        std = np.array(statistics.std)
        self.order = np.argsort(-std / channel_steps, kind="stable") if order is None else order
        # An input's unit is 1 / TOP of `_RANGE` standard deviations, or 1 / UNIT of a step if that is coarser.
        gain = np.minimum(np.round(channel_steps * TOP / (_RANGE * std) * 2**9), _MOST_GAIN)[self.order]
        self.register_buffer("channel_steps", torch.from_numpy(channel_steps[self.order]), persistent=False)
        noise = channel_steps / STEP_OF_STD
        spread = np.sqrt(np.maximum(np.square(std / noise) - 1, 0))  # `std` includes the noise
        self.register_buffer("equal_noise", torch.from_numpy(spread).float(), persistent=False)
        self.register_buffer("channels", torch.from_numpy(self.order))
        self.register_buffer("inverse", torch.from_numpy(np.argsort(self.order)), persistent=False)
        self.register_buffer("gain", torch.from_numpy(gain).float(), persistent=False)
        self.register_buffer("feedback", None, persistent=False)
        self.nets = nn.ModuleList(_net(config.width, layout) for layout in self.layouts)

    def round_by(self, feedback: Feedback | None) -> None:
        """Round with error feedback as encoders do; call it before the module is moved to a device."""
        if feedback is not None:
            weights = feedback.weights[self.order][:, self.order] * 2.0**-WEIGHT_BITS
            self.feedback = torch.from_numpy(weights).float()

    def draw(self, means: torch.Tensor, keys: torch.Tensor, steps: tuple[float, float], dithered: float) -> Drawn:
        """Draw how images (b, z, h, w) are quantised, as their keys (b,) decide: with steps between the two, evenly in
        their logarithm, and a share of the images `dithered`."""
        low, high = (math.log(s) for s in steps)
        step = (STEP_ONE * torch.exp(low + (high - low) * uniform(fold(keys, _STEP)))).round()  # (b,)
        with_dither = uniform(fold(keys, _DITHERED)) < dithered
        seeds = fold(keys, _NOISE)
        bits = self.reorder(hashes(fold(seeds), means[0].numel()).view(means.shape))  # as `quantizer.dither` has them
        wide = torch.float64 if has_float64(means.device) else torch.float32  # float64, as in a bitstream
        offset = (((bits >> 48) & 0xFFFF).to(wide) + 0.5) / 2**16 - 0.5
        offset = offset * with_dither[:, None, None, None]
        size = self.channel_steps.to(wide)[:, None, None] * step[:, None, None, None] / STEP_ONE
        return Drawn(self.reorder(means).to(wide) / size, offset, step.long(), with_dither, seeds)

    def code(self, drawn: Drawn) -> Coded:
        """Quantise latents pass by pass as a bitstream does, and return their bits and values.

        The width of a distribution learns from the integers. Its location cannot, because the integers are whole steps
        around it. It learns from the latents before rounding: from their cost, and, where the integer is 0, so that a
        decoder reads the location itself, from their squared distance.
        """
        h, w = drawn.scaled.shape[2:]
        scale = drawn.step.float()[:, None, None, None] * self.gain[:, None, None] * 2.0**-19  # input units in a step
        known: list[torch.Tensor] = []  # (b, channels, h, w) each, in steps
        errors = torch.zeros_like(drawn.scaled, dtype=torch.float32)  # rounding errors of known latents, in steps
        costs: list[torch.Tensor] = []  # (b, channels) bits of each pass
        for layout, net in zip(self.layouts, self.nets, strict=True):
            group = slice(layout.start, layout.stop)
            unit = scale[:, group, :, 0] / UNIT  # (b, g, 1)
            outputs = self._run(net, layout, self._inputs(known, layout, scale), drawn)  # (b, 2g, n)
            located, wide = outputs.float().chunk(2, dim=1)
            located = located / unit
            width = (torch.exp2(wide.clamp(max=64.0)) / unit).clamp(2.0**-5, 2.0**6)  # beyond 2^127 is no gradient
            own, dither = (gather(t[:, group], layout) for t in (drawn.scaled, drawn.dither))
            with float32_island(own):
                if drawn.exact:
                    found = own
                    costs.append(_logistic_bits(own - located, width))
                else:
                    dithered = drawn.dithered[:, None, None]
                    meant = own
                    if self.feedback is not None and layout.inputs:
                        own = torch.where(dithered, own, own - self._feed_back(errors, layout))
                    found = _rounded(own, dither, dithered, located.detach())
                    cost = _logistic_bits(found - located.detach(), width)
                    distance = torch.where(dithered, found, own.float()) - located
                    read = ~dithered & ((found - located.detach()).abs() < 0.5)
                    error = torch.where(read, distance, 0).square().sum(2)
                    learn = _logistic_bits(distance, width.detach()) + BITS_OF_ERROR * error
                    costs.append(cost + learn - learn.detach())
                    errors[:, group] += scatter((found - meant).float().detach(), (h, w), layout)
            placed = scatter(found, (h, w), layout)
            again = layout.inputs > layout.start  # a later pass of the same channels
            known = [*known[:-1], known[-1] + placed] if again else [*known, placed]
            if again:
                costs[-2:] = [costs[-2] + costs[-1]]
        z, bits = torch.cat(known, 1) * self.sizes(drawn.step), torch.cat(costs, 1) / (h * w)
        return Coded(bits[:, self.inverse], z[:, self.inverse])

    @torch.no_grad()
    def _feed_back(self, errors: torch.Tensor, layout: PassLayout) -> torch.Tensor:
        """Return what a pass' latents are to be reduced by, (b, g, n) in steps; `Feedback.shift` is its negative."""
        assert self.feedback is not None
        weights = self.feedback[layout.start : layout.stop, : layout.inputs]
        return gather(conv2d(errors[:, : layout.inputs], weights, padding=REACH), layout)

    def _inputs(self, known: list[torch.Tensor], layout: PassLayout, scale: torch.Tensor) -> torch.Tensor | None:
        """Return known latents as a pass' network sees them, in whole numbers of its unit."""
        if not known:
            return None
        x = torch.cat([_view(t, layout) for t in known], 1)
        x = x * scale[:, : x.shape[1]]
        return (x + ((x + 0.5).floor() - x).detach()).clamp(-TOP, TOP) / UNIT  # straight-through gradient

    def _run(self, net: nn.Module, layout: PassLayout, known: torch.Tensor | None, drawn: Drawn) -> torch.Tensor:
        b, _, h, w = _view(drawn.scaled, layout).shape
        device = drawn.scaled.device
        row, column = (torch.arange(side, device=device) for side in (h, w))
        octave = torch.round(8 * torch.log2(drawn.step.float() / STEP_ONE)) * 4 / UNIT
        signals = torch.ones(b, SIGNALS, h, w, device=device)
        signals[:, 1] = ((row[:, None] + column) % 2 == 0).float()  # as a frozen prior's; made where it is used
        signals[:, 2] = octave.clamp(-TOP / UNIT, TOP / UNIT)[:, None, None]
        signals[:, 3] = drawn.dithered[:, None, None].float()
        top = TOP / _HIDDEN
        y = net[0](signals if known is None else torch.cat([known, signals], 1)).clamp(0, top)  # pyright: ignore[reportIndexIssue]
        y = _conv_at(net[1], y, layout).clamp(0, top)  # pyright: ignore[reportIndexIssue]
        y = net[2](y).clamp(0, top)  # pyright: ignore[reportIndexIssue]
        return net[3](y).flatten(2)  # pyright: ignore[reportIndexIssue]

    def take(self, z: torch.Tensor, step: torch.Tensor, *, exact: bool = False) -> Drawn:
        """Take latents (b, z, h, w), to be rounded at steps (b,) without dither, or, with `exact`, to be left as they
        are because they already hold noise as large as the steps'."""
        code = (STEP_ONE * step).round()
        scaled = self.reorder(z) / self.sizes(code)
        none = torch.zeros((), device=z.device).expand_as(scaled)
        return Drawn(scaled, none, code.long(), torch.full_like(code, exact, dtype=torch.bool), code.long(), exact)

    def sizes(self, step: torch.Tensor) -> torch.Tensor:
        """Return the width of one step of each channel, (b, z, 1, 1) in the prior's order, for stored steps (b,)."""
        return self.channel_steps[:, None, None] * (step.float() / STEP_ONE)[:, None, None, None]

    def reorder(self, z: torch.Tensor) -> torch.Tensor:
        """Bring channels from the model's to the prior's order."""
        return z[:, self.channels]

    def unquantized(self, drawn: Drawn) -> list[Scaled]:
        """Return each image's latents as the entropy coder takes them, with channels in the model's order."""
        latents = np.empty(drawn.scaled.shape, np.float64)
        latents[:, self.order] = drawn.scaled.cpu().numpy()
        steps, dithered = drawn.step.tolist(), drawn.dithered.tolist()
        seeds = [seed % 2**64 if d else None for seed, d in zip(drawn.seeds.tolist(), dithered, strict=True)]
        return [Scaled(own, s, seed) for own, s, seed in zip(latents, steps, seeds, strict=True)]

    @torch.no_grad()
    def thaw(self, prior: context.ContextPrior) -> None:
        """Load the weights of a frozen prior: the inverse of `freeze`, except for rounding.

        From a prior with other groups or levels, load the passes that decode the same channels at the same positions;
        the others keep their weights. A prior of fewer channels is that of a model from which this one's grew. Raises
        `ValueError` if there is no such pass, or if the width or the order of channels differs.
        """
        passes = dict(zip(prior.layouts, prior.networks, strict=True))
        common = [
            (layout, net, passes[layout])
            for layout, net in zip(self.layouts, self.nets, strict=True)
            if layout in passes
        ]
        grown = prior.channels < len(self.order) and np.array_equal(self.order, np.arange(len(self.order)))
        same = prior.config.width == self.config.width and (grown or np.array_equal(prior.order, self.order))
        if not same or not common:
            raise ValueError(
                f"a prior of {prior.config} does not fit one of {self.config}, or orders channels otherwise"
            )
        for layout, net, frozen in common:
            for layer, numbers, (inputs, outputs) in zip(net, frozen, _units(layout), strict=True):  # pyright: ignore[reportArgumentType]
                power = torch.exp2(numbers.shift.double())
                units = torch.as_tensor(outputs, dtype=torch.float64).expand(len(power))
                weight = numbers.weight.double() * (inputs / (units * power))[:, None]
                layer.weight.copy_(weight.unflatten(1, layer.weight.shape[1:]))
                layer.bias.copy_(numbers.bias.double() / (units * power))

    @torch.no_grad()
    def freeze(self, tables: Tables) -> context.ContextPrior:
        """Return the prior in integers, with the given tables."""
        gain = self.gain.cpu().numpy().astype(np.int64)
        by_channel = np.empty_like(gain)
        by_channel[self.order] = gain
        offset = np.round(152 - 8 * np.log2(by_channel)).astype(np.int64)
        passes = []
        for layout, net in zip(self.layouts, self.nets, strict=True):
            layers = [
                _frozen(layer, inputs, outputs)
                for layer, (inputs, outputs) in zip(net, _units(layout), strict=True)  # pyright: ignore[reportArgumentType]
            ]
            passes.append(tuple(layers))
        return context.ContextPrior(self.config, self.order, by_channel, offset, passes, tables)


def _units(layout: PassLayout) -> list[tuple[int, int | torch.Tensor]]:
    """Return the integers per unit of each layer's inputs and outputs; (2g,), row by row, for the last outputs."""
    g = layout.stop - layout.start
    last = torch.tensor([_LOCATED] * g + [_WIDE] * g)
    return [(UNIT, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, last)]


def _net(width: int, layout: PassLayout) -> nn.ModuleList:
    layers = [
        nn.Conv2d(layout.inputs + SIGNALS, width, 3, padding=1),
        nn.Conv2d(width, width, 3),
        nn.Conv2d(width, width, 1),
    ]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.ModuleList([*layers, nn.Conv2d(width, 2 * (layout.stop - layout.start), 1)])


_RUNS: dict[Sites, tuple[tuple[int, int, int], ...]] = {
    Sites.EVEN: ((0, 0, 2), (1, 1, 2)),
    Sites.ODD: ((0, 1, 2), (1, 0, 2)),
    Sites.CENTRES: ((1, 1, 2),),
    Sites.ALL: ((0, 0, 1),),
}


def _runs(layout: PassLayout, unit: int) -> list[tuple[int, int, int]]:
    """Return first row, first column and stride of the grids that a pass' positions form, spaced by `unit`."""
    return [(row * unit, column * unit, stride * unit) for row, column, stride in _RUNS[layout.sites]]


def _view(x: torch.Tensor, layout: PassLayout) -> torch.Tensor:
    """Return the part of (b, c, h, w) that a pass' network sees."""
    return x[:, :, :: layout.view, :: layout.view]


def gather(x: torch.Tensor, layout: PassLayout) -> torch.Tensor:
    """Gather the values (b, c, n) of (b, c, h, w) at a pass' positions.
    Sides are multiples of twice its grid's spacing, or of the spacing if the pass decodes the whole grid."""
    found = [x[:, :, row::stride, column::stride] for row, column, stride in _runs(layout, layout.spacing)]
    return torch.cat(found, 2).flatten(2)


def _conv_at(layer: nn.Module, x: torch.Tensor, layout: PassLayout) -> torch.Tensor:
    """Convolve the input of a pass' network at its positions, in the order of `gather`."""
    assert isinstance(layer, nn.Conv2d)
    x, runs = pad(x, (1, 1, 1, 1)), _runs(layout, layout.spacing // layout.view)
    found = [conv2d(x[:, :, r:, c:], layer.weight, layer.bias, stride=stride) for r, c, stride in runs]
    return torch.cat(found, 2)


def scatter(values: torch.Tensor, size: tuple[int, int], layout: PassLayout) -> torch.Tensor:
    """Scatter values (b, c, n) of a pass' positions into (b, c, h, w), with 0 elsewhere; the inverse of `gather`."""
    placed, first = values.new_zeros(*values.shape[:2], *size), 0
    for row, column, stride in _runs(layout, layout.spacing):
        run = placed[:, :, row::stride, column::stride]
        stop = first + run[0, 0].numel()
        run.copy_(values[:, :, first:stop].unflatten(2, run.shape[2:]))
        first = stop
    return placed


@torch.no_grad()
def _rounded(scaled: torch.Tensor, dither: torch.Tensor, dithered: torch.Tensor, located: torch.Tensor) -> torch.Tensor:
    """Round latents in steps as a bitstream does, to whole steps around the dither or the location; float32."""
    expected = ((8 * located + 0.5).floor() / 8).clamp(-LIMIT, LIMIT)  # in eighths, as in the frozen prior
    offset = torch.where(dithered, dither, expected.to(dither.dtype))
    rest = scaled - offset
    return (torch.where(dithered, rest.round(), round_with_dead_zone(rest)) + offset).float()


def _logistic_bits(distance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return -log2 of the logistic's mass within half a step of `distance` (b, g, n) from its centre, summed per image
    and channel, (b, g)."""
    upper, lower = (distance + 0.5) / scale, (distance - 0.5) / scale
    nats = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(-1 / scale))
    return -nats.sum(2) / math.log(2)


def _frozen(layer: nn.Module, inputs: int, outputs: int | torch.Tensor) -> context.Layer:
    """Round a layer to integers, with `inputs` and `outputs` (one, or one for each row) integers per unit.
    A row's scale is the largest power of two that keeps its weights within `TOP` and its bias far below 2^24."""
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    units = torch.as_tensor(outputs, dtype=torch.float64).expand(layer.out_channels)
    weight = layer.weight.detach().cpu().double().flatten(1) * (units / inputs)[:, None]
    bias = layer.bias.detach().cpu().double() * units
    room = torch.minimum(TOP / weight.abs().amax(1).clamp(min=1e-9), 2**22 / bias.abs().clamp(min=1e-9))
    shift = torch.log2(room).floor().clamp(1, 20)
    power = torch.exp2(shift)
    return context.Layer(
        (weight * power[:, None]).round().clamp(-TOP, TOP).to(torch.int8),
        (bias * power).round().to(torch.int32),
        shift.to(torch.int32),
    )


def logistic_tables() -> Tables:
    """Return a table of the logistic's masses for each location and scale, where counting starts."""
    return join([_logistic_table(*context.table_scale(table)) for table in range(TABLES)])


def _logistic_table(location: float, scale: float) -> tuple[int, np.ndarray]:
    reach = max(3, math.ceil(14 * scale) + 1)  # a millionth lies beyond
    edges = (np.arange(-reach, reach + 2) - 0.5 - location) / scale
    cumulative = 0.5 + 0.5 * np.tanh(edges / 2)
    return -reach, normalize(np.r_[np.diff(cumulative) + 1e-9, 1e-6])


_PSEUDO_COUNT = 2_000


def counted_tables(start: Tables, values: np.ndarray, tables: np.ndarray) -> Tables:
    """Count the values (n,) coded under each of the tables (n,); `start` weighs as much as `_PSEUDO_COUNT` values."""
    symbols, _ = start.symbols(values, tables)
    first = np.cumsum(start.sizes, dtype=np.int64) - start.sizes
    seen = np.bincount(first[tables] + symbols, minlength=len(start.counts))
    weights = seen + start.counts * (_PSEUDO_COUNT / start.frequencies(0).sum())
    parts = np.split(weights, first[1:])
    return join([(int(f), normalize(part)) for f, part in zip(start.first, parts, strict=True)])
