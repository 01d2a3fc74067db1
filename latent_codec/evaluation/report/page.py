"""Define what a report is made of, and render it as one HTML page."""

import base64
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from latent_codec.images.geometry import Geometry
from latent_codec.images.write import image_bytes
from latent_codec.model.codec import Codec

METRICS = {"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}
"""Table headings of the metrics by which files are compared."""

NOT_GAUSSIAN = "the posterior is not Gaussian: nothing is drawn from it, and it has no KL against N(0, I)"
NOT_CONTINUOUS = "latents are codes from a codebook, and there is nothing between two codes"

_HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters, surrogates and Unicode's bidirectional controls, which can make a name read backwards."""


class Number(NamedTuple):
    """Hold a result and what it takes to reproduce it."""

    name: str
    """Key in the JSON, unique within a section."""
    label: str
    value: float | int | None
    """None where it is undefined."""
    unit: str
    protocol: str


@dataclasses.dataclass(frozen=True)
class Section:
    """Hold one part of a report."""

    name: str
    """Key in the JSON, place in the page and name of the macro in sections.html.jinja."""
    title: str
    view: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values that the macro shows."""
    numbers: Sequence[Number] = ()
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further JSON values: of single images, channels, settings."""

    def json(self) -> dict[str, Any]:
        """Return numbers and records as JSON values."""
        numbers = {n.name: {"value": n.value, "unit": n.unit, "protocol": n.protocol} for n in self.numbers}
        return numbers | self.records


class EmbeddedImage(NamedTuple):
    """Hold an image that is part of the page."""

    uri: str
    width: int
    height: int
    alt: str
    """Text for readers who do not see it."""
    caption: str = ""


def embed(data: bytes, kind: str, size: tuple[int, int], alt: str, caption: str = "") -> EmbeddedImage:
    """Embed an image file of the MIME type image/`kind`; `size` is (width, height) as shown."""
    return EmbeddedImage(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", *size, alt, caption)


def picture(pixels: torch.Tensor, alt: str, caption: str = "") -> EmbeddedImage:
    """Embed pixels (3, h, w) uint8 as a PNG."""
    _, height, width = pixels.shape
    geometry = Geometry(width=width, height=height, orientation=1, mode="RGB", background=None)
    return embed(image_bytes(pixels.contiguous(), geometry, "png"), "png", (width, height), alt, caption)


def pictures(pixels: torch.Tensor, alt: str, captions: Sequence[str] = ()) -> list[EmbeddedImage]:
    """Embed a row of images (n, 3, h, w) uint8."""
    count = len(pixels)
    shown = zip(pixels, captions or [""] * count, strict=True)
    return [picture(x, f"{alt}, {i} of {count}", caption) for i, (x, caption) in enumerate(shown, 1)]


def left_out(name: str, title: str, reason: str) -> Section:
    """Return a section that says why it is empty."""
    return Section(name, title, records={"left_out": reason})


def render(title: str, introduction: str, sections: Sequence[Section]) -> str:
    """Return the page, which loads nothing and runs nothing; all text from outside is escaped."""
    page = _environment().get_template("page.html.jinja")
    return page.render(title=title, introduction=introduction, sections=sections) + "\n"


@functools.cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, finalize=_plain, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["written"] = written
    return environment


def _plain(value: object) -> object:
    """Spell out characters that show nothing or reorder the text around them."""
    if isinstance(value, Markup):
        return value
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), str(value))


def written(value: float | None) -> str:
    """Format a number to four digits; None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}"


def finite(value: float) -> float | None:
    """Return a value for JSON, None if it is infinite or NaN (the PSNR of an equal image)."""
    return value if math.isfinite(value) else None


def is_gaussian(codec: Codec) -> bool:
    """Return whether posteriors are Gaussian."""
    return codec.config.bottleneck.kind == "gaussian"


def is_continuous(codec: Codec) -> bool:
    """Return whether latents are real numbers, not codes from a codebook."""
    return codec.config.bottleneck.kind in ("gaussian", "identity")
