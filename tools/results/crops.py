"""Show details of photographs under several codecs at equal bytes, side by side in one picture."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.rate_distortion.anchors import ANCHORS
from latent_codec.evaluation.report.rate import code_image
from latent_codec.images.geometry import Image
from latent_codec.images.read import read_image
from latent_codec.images.write import rgb_pixels, to_pil
from latent_codec.inference.runner import Runner
from latent_codec.metrics import distortion
from latent_codec.prior.quantizer import step_code
from latent_codec.storage.files import atomic_path, write_text
from tools.benchmark.record import machine
from train.loop.provenance import git_commit

QUALITIES = range(1, 101)
"""Anchors' qualities, among which the largest file that fits is looked for."""

ZOOM, MARGIN, CAPTION = 2, 4, 16  # pixels, but for the zoom; even, so that 4:2:0 loses no colour of doubled pixels


class Detail(NamedTuple):
    """Name a square of an image by its upper left corner."""

    image: str
    left: int
    top: int


class Sheet(NamedTuple):
    """Say what the picture shows and where it goes."""

    photos: Path
    details: tuple[Detail, ...]
    side: int
    """Side of each detail in pixels."""
    steps: tuple[float, ...]
    """Quantiser steps, each of which gives the size that the anchors keep to."""
    path: Path
    """File of the picture, a JPEG."""


class _Tile(NamedTuple):
    """Hold one codec's detail and its cost."""

    codec: str
    setting: str
    size: int | None
    """Bytes of the whole image's file; None for the original."""
    psnr: float | None
    """PSNR of the whole image in dB."""
    detail: PilImage.Image


def make_sheet(runner: Runner, sheet: Sheet, record: Path) -> None:
    """Write the picture, a row for each detail and step, and its contents as JSON at `record`.

    A row shows the original, the anchors that Pillow has, by the largest file within our size or else the smallest, and
    ours. Raises `UserError` if an image cannot be read or is smaller than a detail, or the model has no prior.
    """
    rows: list[tuple[Detail, float, list[_Tile]]] = []
    for detail in sheet.details:
        image = read_image(sheet.photos / detail.image)
        geometry = image.geometry
        if detail.left + sheet.side > geometry.width or detail.top + sheet.side > geometry.height:
            raise UserError(
                f"{detail.image}: a detail of {sheet.side} pixels at {detail.left}, {detail.top} does not fit into "
                f"{geometry.width}x{geometry.height}; give another corner"
            )
        rows += [(detail, step, _tiles(runner, sheet, detail, image, step)) for step in sheet.steps]
    data = _draw([tiles for _, _, tiles in rows], sheet.side)
    with atomic_path(sheet.path) as temporary:
        temporary.write_bytes(data)
    about: dict[str, Any] = {
        "model_id": runner.model_id,
        "stream_id": StreamCodec(runner.codec, runner.options.device).stream_id.hex(),
        "sheet_sha256": hashlib.sha256(data).hexdigest(),
        "side": sheet.side,
        "zoom": ZOOM,
        "settings": [anchor.settings() for anchor in anchors.available()],
        "missing": [anchor.name for anchor in ANCHORS if anchor not in anchors.available()],
        "commit": git_commit(),
    }
    found = {"about": about | machine(runner.options.device), "rows": []}
    for detail, step, tiles in rows:
        files = [{"codec": t.codec, "setting": t.setting, "bytes": t.size, "psnr": t.psnr} for t in tiles[1:]]
        found["rows"].append(detail._asdict() | {"step": step, "files": files})
    write_text(record, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _tiles(runner: Runner, sheet: Sheet, detail: Detail, image: Image, step: float) -> list[_Tile]:
    """Return the tiles of one row: the original, the anchors and ours."""
    original = to_pil(image.pixels, image.geometry)
    box = (detail.left, detail.top, detail.left + sheet.side, detail.top + sheet.side)

    def tile(name: str, setting: str, size: int | None, decoded: PilImage.Image) -> _Tile:
        psnr = None if size is None else distortion.psnr(image.pixels[None], rgb_pixels(decoded)[None]).item()
        return _Tile(name, setting, size, psnr, decoded.convert("RGB").crop(box))

    coder = StreamCodec(runner.codec, runner.options.device)
    size, pixels = code_image(runner, coder, image, step_code(step))
    tiles = [tile("original", "", None, original)]
    for anchor in anchors.available():
        lowest = QUALITIES[0], anchors.encode(anchor, original, QUALITIES[0])
        quality, file = anchors.largest_within(anchor, original, size, QUALITIES) or lowest
        decoded = anchors.decode(anchor, file, original.mode)
        tiles.append(tile(anchor.name, f"quality {quality}", len(file), decoded))
    return [*tiles, tile("photo", f"step {step:g}", size, to_pil(pixels, image.geometry))]


def _draw(rows: Sequence[Sequence[_Tile]], side: int) -> bytes:
    """Return a JPEG of quality 95: tiles at twice their size, nearest pixel, with text under each."""
    width, height = ZOOM * side + MARGIN, ZOOM * side + 2 * CAPTION + MARGIN
    canvas = PilImage.new("RGB", (width * max(map(len, rows)) - MARGIN, height * len(rows)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            shown = tile.detail.resize((ZOOM * side, ZOOM * side), PilImage.Resampling.NEAREST)
            canvas.paste(shown, (x * width, y * height))
            under = "" if tile.size is None else f"{tile.size:,} bytes, {tile.psnr:.2f} dB"
            below = (x * width + 2, y * height + ZOOM * side + 1)
            pen.text(below, f"{tile.codec} {tile.setting}\n{under}", fill="black", font=font, spacing=2)
    file = io.BytesIO()
    canvas.save(file, format="JPEG", quality=95, subsampling="4:2:0", optimize=True)
    return file.getvalue()
