"""Rate-distortion curves as an SVG: the same bytes from the same figures, whatever is installed."""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

from latent_codec.evaluation.rate_distortion.report import REFINED
from latent_codec.metrics.bjontegaard import SCALES
from tools.results.curves import best, metrics_of, points, published

WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 300, 46, 54, 66
"""Of a panel and what surrounds it, in the picture's units."""

_MEASURED = {
    "context": ("photo, context prior", "#c1272d"),
    "factorized": ("photo, factorised prior", "#e8871e"),
    REFINED: ("photo, refined", "#7a1020"),
    "JPEG": ("JPEG", "#444444"),
    "WebP": ("WebP", "#2a7f4f"),
    "AVIF": ("AVIF", "#2b5fa8"),
}
_PUBLISHED = {
    "bmshj2018-factorized": "#b9a03c",
    "bmshj2018-hyperprior": "#8a6d3b",
    "mbt2018-mean": "#7b4fa3",
    "cheng2020-anchor": "#c46fa8",
    "ELIC": "#1c9aa8",
    "VTM": "#1b2a5c",
    "AV1": "#7c9a2d",
}

_AXES = {"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM, -10 log10(1 - x), dB", "lpips": "LPIPS (lower is better)"}


class _Line(NamedTuple):
    label: str
    colour: str
    dashed: bool
    points: list[tuple[float, float]]


class _Axis(NamedTuple):
    """From values to positions on a line of `length`, the values' logarithms if `logarithmic`."""

    low: float
    high: float
    length: int
    logarithmic: bool

    def __call__(self, value: float) -> float:
        of: Callable[[float], float] = math.log if self.logarithmic else float
        return self.length * (of(value) - of(self.low)) / (of(self.high) - of(self.low))

    def ticks(self) -> list[float]:
        if self.logarithmic:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [float(f"{digit}e{ten}") for ten in tens for digit in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 8
            ten = 10.0 ** math.floor(math.log10(rough))
            step = next(digit * ten for digit in (1, 2, 5, 10) if digit * ten >= rough)
            found = [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in found if self.low <= tick <= self.high]


def svg(rd: dict[str, Any]) -> str:
    """One panel for each metric that was measured; published curves are dashed, in the panel of PSNR alone."""
    names = metrics_of(rd)
    panels = [_lines(rd, name) for name in names]
    across = LEFT + len(names) * (WIDTH + GAP) - GAP + 16
    legend = list(_legend(panels[0], TOP + HEIGHT + 58, across))
    height = TOP + HEIGHT + 50 + 20 * (1 + max(y for y, _ in legend))
    about = rd["about"]
    title = f"{about['set']}, {about['images']} images, means; bits per pixel of whole files; dashed: published"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {height}" width="{across}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{across}" height="{height}" fill="white"/>',
        f'<text x="{across / 2:g}" y="20" text-anchor="middle" font-size="13">{escape(title)}</text>',
    ]
    right = 1.05 * max(p["bpp"] for p in points(rd, best(rd)))
    for i, (name, lines) in enumerate(zip(names, panels, strict=True)):
        parts += _panel(name, lines, right, LEFT + i * (WIDTH + GAP), f"clip{i}")
    return "\n".join([*parts, *(part for _, part in legend), "</svg>", ""])


def _lines(rd: dict[str, Any], metric: str) -> list[_Line]:
    """By depth: ours last, so that they are on top."""
    of = SCALES[metric].of if metric == "ms_ssim" else float
    found = []
    if metric == "psnr":
        found += [_Line(c.name, _PUBLISHED[c.name], True, list(c.points)) for c in published(rd)]
    codecs = list(dict.fromkeys(p["codec"] for p in rd["summary"]["points"]))
    for codec in reversed(codecs):
        label, colour = _MEASURED[codec]
        own = [(p["bpp"], of(p[metric])) for p in points(rd, codec) if p[metric] is not None]
        found.append(_Line(label, colour, False, own))
    return found


def _panel(metric: str, lines: Sequence[_Line], right: float, left: int, clip: str) -> Iterator[str]:
    inside = [y for line in lines for x, y in line.points if x <= right]
    logarithmic = metric == "lpips" and min(inside) > 0
    room = 0.04 * (max(inside) - min(inside)) or 1.0
    low, high = (min(inside) * 0.85, max(inside) * 1.15) if logarithmic else (min(inside) - room, max(inside) + room)
    x_axis, y_axis = _Axis(0, right, WIDTH, False), _Axis(low, high, HEIGHT, logarithmic)
    yield f'<g transform="translate({left} {TOP})">'
    yield f'<clipPath id="{clip}"><rect width="{WIDTH}" height="{HEIGHT}"/></clipPath>'
    yield f'<text x="{WIDTH / 2:g}" y="-8" text-anchor="middle" font-size="12">{_AXES[metric]}</text>'
    for tick in x_axis.ticks():
        yield f'<path d="M{x_axis(tick):.1f} 0v{HEIGHT}" stroke="#e4e4e4"/>'
        yield f'<text x="{x_axis(tick):.1f}" y="{HEIGHT + 15}" text-anchor="middle">{tick:.3g}</text>'
    for tick in y_axis.ticks():
        y = HEIGHT - y_axis(tick)
        yield f'<path d="M0 {y:.1f}h{WIDTH}" stroke="#e4e4e4"/>'
        yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
    yield f'<text x="{WIDTH / 2:g}" y="{HEIGHT + 31}" text-anchor="middle">bits per pixel</text>'
    yield f'<g clip-path="url(#{clip})">'
    for line in lines:
        places = [(x_axis(x), HEIGHT - y_axis(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        style = 'stroke-width="1.3" stroke-dasharray="5 3"' if line.dashed else 'stroke-width="1.8"'
        yield f'<polyline points="{path}" fill="none" stroke="{line.colour}" {style}/>'
        if not line.dashed:
            yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{line.colour}"/>' for x, y in places)
    yield "</g>"
    yield f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="#444444"/></g>'


def _legend(lines: Sequence[_Line], top: int, across: int) -> Iterator[tuple[int, str]]:
    """(row, element) of each label; what was measured first, ours at its head, then what was published."""
    x, row = LEFT, 0
    measured = [line for line in reversed(lines) if not line.dashed]
    for line in measured + [line for line in lines if line.dashed]:
        label = f"{line.label} (published)" if line.dashed else line.label
        room = 42 + 6.2 * len(label)
        if x + room > across:
            x, row = LEFT, row + 1
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        y = top + 20 * row
        yield row, f'<path d="M{x:.1f} {y - 4}h22" stroke="{line.colour}" stroke-width="2"{dash}/>'
        yield row, f'<text x="{x + 27:.1f}" y="{y}">{escape(label)}</text>'
        x += room
