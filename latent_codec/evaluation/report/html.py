"""HTML by functions: whatever is not marked as HTML is escaped."""

import base64
import html
import unicodedata
from typing import NamedTuple

import torch

from latent_codec.images.geometry import Geometry
from latent_codec.images.write import image_bytes

_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
"""Unicode's bidirectional controls, with which a name can make what stands beside it read backwards."""

_VOID = {"br", "img", "link", "meta"}


class Html(str):
    """Text that is HTML already."""


def escaped(value: object) -> Html:
    """Safe between tags and in quoted attributes; characters that show nothing or turn others around are spelled."""
    if isinstance(value, Html):
        return value
    return Html(html.escape("".join(_visible(c) for c in str(value))))


def _visible(c: str) -> str:
    hidden = unicodedata.category(c) in {"Cc", "Cs"} and c not in "\n\t"
    if hidden or unicodedata.bidirectional(c) in _TURNING:
        return c.encode("unicode_escape").decode("ascii")
    return c


def join(*parts: object) -> Html:
    return Html("".join(map(escaped, parts)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; an attribute's underscores at the end go, those within become hyphens."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escaped(v)}"' for key, v in attributes.items())
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def name_of(value: str) -> Html:
    """A file's name, or the like, from strangers: it cannot reorder the text around it."""
    return tag("bdi", value, class_="name")


class Picture(NamedTuple):
    """One image with what stands below it."""

    pixels: torch.Tensor  # (3, h, w) uint8
    caption: object
    alt: str
    """What a reader who does not see it is told."""


_ENLARGED = 64  # pixels; smaller pictures are shown larger
_LEAST_WIDTH = 112  # as shown


def image(data: bytes, kind: str, width: int, height: int, alt: str) -> Html:
    """An image within the page, of a MIME type `image/<kind>`."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    small = {"class_": "small"} if max(width, height) <= _ENLARGED else {}
    return tag("img", src=source, width=width, height=height, alt=alt, **small)


def figure(picture: Picture) -> Html:
    _, height, width = picture.pixels.shape
    geometry = Geometry(width=width, height=height, orientation=1, mode="RGB", background=None)
    data = image_bytes(picture.pixels.contiguous(), geometry, "png")
    caption = [tag("figcaption", picture.caption)] if picture.caption else []
    return tag("figure", image(data, "png", width, height, picture.alt), *caption)


def strip(title: object, pictures: list[Picture]) -> Html:
    """Pictures side by side under one title; on a narrow screen they scroll sideways."""
    width = max(_LEAST_WIDTH, *(picture.pixels.shape[2] for picture in pictures))
    few = "row few" if len(pictures) <= 4 else "row"
    row = tag("div", *map(figure, pictures), class_=few, style=f"--columns:{len(pictures)};--width:{width}px")
    return tag("section", tag("h3", title), row, class_="strip")


def table(head: tuple[str, ...], rows: list[tuple[object, ...]], *, look: str = "scroll") -> Html:
    """On a narrow screen it scrolls sideways, or each row becomes a block with the look "stack"."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = (tag("tr", tag("th", row[0], scope="row"), *map(_cell, row[1:])) for row in rows)
    return tag("div", tag("table", top, tag("tbody", *body)), class_=look)


def _cell(content: object) -> Html:
    """Short ones are not broken into lines, long ones have room for some words on each."""
    length = len(str(content))
    return tag("td", content, **({"class_": "number"} if length < 12 else {"class_": "words"} if length > 40 else {}))


def paragraph(*parts: object) -> Html:
    return tag("p", *parts)


def paragraphs(*texts: str) -> Html:
    return join(*map(paragraph, texts))
