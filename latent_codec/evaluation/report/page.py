"""What a report is made of, and the whole of it as one page and as JSON."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from latent_codec.evaluation.report.html import Html, join, table, tag
from latent_codec.model.codec import Codec

_STYLE = Path(__file__).with_name("style.css")

# Nothing is loaded and nothing runs, whatever a file's name or a model's metadata may hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


METRICS = {"psnr": "PSNR, dB", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}
"""What distortion is told by where files are compared, as a table's head has it."""


class Number(NamedTuple):
    """A result and all that it takes to reproduce it."""

    name: str
    """Its key in the JSON, unique within a section."""
    label: str
    value: float | int | None
    """None where it is not defined."""
    unit: str
    protocol: str

    def json(self) -> dict[str, Any]:
        return {"value": self.value, "unit": self.unit, "protocol": self.protocol}

    @property
    def shown(self) -> str:
        return f"{written(self.value)} {self.unit}".strip()


class Section(NamedTuple):
    name: str
    """Its key in the JSON and its place in the page."""
    title: str
    body: Html
    numbers: list[Number]
    records: dict[str, Any]
    """More for the JSON: of single images, channels, settings."""

    def html(self) -> Html:
        rows: list[tuple[object, ...]] = [(n.label, tag("b", n.shown), n.protocol) for n in self.numbers]
        found = table(("", "value", "how"), rows, look="stack") if rows else Html()
        return tag("section", tag("h2", self.title), self.body, found, id=self.name)

    def json(self) -> dict[str, Any]:
        return {n.name: n.json() for n in self.numbers} | self.records


def written(value: float | None) -> str:
    """A number for people: four digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:#.4g}"


def finite(value: float) -> float | None:
    """What JSON can hold: an image that comes back without any error has no PSNR."""
    return value if math.isfinite(value) else None


NOT_GAUSSIAN = "the posterior is no Gaussian: nothing is drawn from it, and it has no KL against N(0, I)"
NOT_CONTINUOUS = "latents are codes from a codebook, and between two codes there is none"


def is_gaussian(codec: Codec) -> bool:
    return codec.config.bottleneck.kind == "gaussian"


def is_continuous(codec: Codec) -> bool:
    """Whether latents can be anything, and not only codes from a codebook."""
    return codec.config.bottleneck.kind in ("gaussian", "identity")


def left_out(name: str, title: str, reason: str) -> Section:
    """In place of what a model has no notion of, or nobody asked for."""
    return Section(name, title, tag("p", f"Left out: {reason}.", class_="absent"), [], {"left_out": reason})


def page(title: str, introduction: Html, sections: list[Section]) -> Html:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    links = (tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections)
    contents = tag("nav", tag("ol", *links), aria_label="Contents")
    header, main = tag("header", tag("h1", title), introduction), tag("main", *(s.html() for s in sections))
    body = tag("body", header, contents, main)
    return join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")
