"""One detail under several codecs at equal bytes, side by side in a picture."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont, features

from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.rate_distortion.anchors import Peer
from latent_codec.images.geometry import Geometry, as_shown, crop, pad
from latent_codec.images.read import read_image
from latent_codec.images.write import rgb_pixels, to_pil
from latent_codec.inference.runner import Runner
from latent_codec.metrics import distortion
from latent_codec.prior.quantizer import step_code
from latent_codec.storage.files import atomic_path, write_text
from tools.benchmark.record import machine
from train.loop.provenance import git_commit

QUALITIES = range(1, 101)
"""Of Pillow's codecs, among which the nearest size is looked for."""

ZOOM, MARGIN, CAPTION = 2, 4, 16  # pixels, but for the zoom; even, so that 4:2:0 loses no colour of doubled pixels


class Detail(NamedTuple):
    """A square of an image, by its left upper corner."""

    image: str
    left: int
    top: int


class Sheet(NamedTuple):
    """What the picture shows and where it goes."""

    photos: Path
    details: tuple[Detail, ...]
    side: int
    """Pixels of each detail."""
    steps: tuple[float, ...]
    """Of the quantiser: each gives the size that all others keep to."""
    path: Path
    """The JPEG."""


class _Tile(NamedTuple):
    """One codec's detail, with what it took."""

    codec: str
    setting: str
    size: int | None
    """Bytes of the file of the whole image; None for the original."""
    psnr: float | None
    """Of the whole image."""
    detail: PilImage.Image


def make_sheet(runner: Runner, sheet: Sheet, record: Path) -> None:
    """Write the picture, a row for each detail and step, and what is in it as JSON at `record`.

    In each row are the original, the peers that this Pillow has, each with its largest file that is no larger than
    ours (its smallest, where all are), and ours. Raises `UserError` if an image cannot be read or is smaller than a
    detail, or the model has no prior.
    """
    rows: list[tuple[Detail, float, list[_Tile]]] = []
    for detail in sheet.details:
        pixels, geometry = read_image(sheet.photos / detail.image)
        if detail.left + sheet.side > geometry.width or detail.top + sheet.side > geometry.height:
            raise UserError(
                f"{detail.image}: a detail of {sheet.side} pixels at {detail.left}, {detail.top} does not fit into "
                f"{geometry.width}x{geometry.height}; give another corner"
            )
        for step, tiles in _rows(runner, sheet, detail, pixels, geometry):
            rows.append((detail, step, tiles))
    data = _draw([tiles for _, _, tiles in rows], sheet.side)
    with atomic_path(sheet.path) as temporary:
        temporary.write_bytes(data)
    about: dict[str, Any] = {
        "model_id": runner.codec.model_id,
        "stream_id": StreamCodec(runner.codec, runner.options.device).stream_id.hex(),
        "sheet_sha256": hashlib.sha256(data).hexdigest(),
        "side": sheet.side,
        "zoom": ZOOM,
        "settings": [peer.settings() for peer in anchors.available()],
        "missing": [peer.name for peer in anchors.PEERS if not features.check(peer.library)],
        "commit": git_commit(),
    }
    found = {"about": about | machine(runner.options.device), "rows": [_json(*row) for row in rows]}
    write_text(record, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _json(detail: Detail, step: float, tiles: Sequence[_Tile]) -> dict[str, Any]:
    files = [
        {"codec": t.codec, "setting": t.setting, "bytes": t.size, "psnr": t.psnr} for t in tiles if t.size is not None
    ]
    return detail._asdict() | {"step": step, "files": files}


def _rows(
    runner: Runner, sheet: Sheet, detail: Detail, pixels: torch.Tensor, geometry: Geometry
) -> Iterator[tuple[float, list[_Tile]]]:
    """(step, tiles) of one detail."""
    original = to_pil(pixels, geometry)
    box = (detail.left, detail.top, detail.left + sheet.side, detail.top + sheet.side)

    def tile(name: str, setting: str, size: int | None, image: PilImage.Image) -> _Tile:
        reached = None if size is None else distortion.psnr(pixels[None], rgb_pixels(image)[None]).item()
        return _Tile(name, setting, size, reached, image.convert("RGB").crop(box))

    for step in sheet.steps:
        data, decoded = _ours(runner, pixels, geometry, step)
        tiles = [tile("original", "", None, original)]
        for peer in anchors.available():
            quality, file = nearest(peer, original, len(data))
            image = anchors.decode(peer, file, original.mode)
            tiles.append(tile(peer.name, f"quality {quality}", len(file), image))
        tiles.append(tile("photo", f"step {step:g}", len(data), decoded))
        yield step, tiles


def _ours(runner: Runner, pixels: torch.Tensor, geometry: Geometry, step: float) -> tuple[bytes, PilImage.Image]:
    """The file, and the image decoded from its bytes."""
    codec, device = runner.codec, runner.options.device
    coder = StreamCodec(codec, device)
    mean = runner.encode([pad(pixels, codec.factor)]).mean[0]  # (z, h/f, w/f)
    (coded,) = coder.compress([(coder.scale(mean, step_code(step), None), geometry)])
    reader = StreamReader(codec, device)
    stream = unpack(coded.data)
    reader.check(stream)
    (latents,) = reader.decompress([stream])
    if isinstance(latents, UserError):
        raise latents
    decoded = crop(runner.decode_uint8([latents])[0], geometry)
    return coded.data, to_pil(as_shown(decoded, geometry), geometry)


def nearest(peer: Peer, image: PilImage.Image, limit: int) -> tuple[int, bytes]:
    """The quality whose file is the largest of at most `limit` bytes, found by halving, and that file.

    If even the lowest quality's file is larger, that one.
    """
    low = QUALITIES[0]
    best = low, anchors.encode(peer, image, low)
    high = QUALITIES[-1] + 1
    while high - low > 1 and len(best[1]) <= limit:
        middle = (low + high) // 2
        data = anchors.encode(peer, image, middle)
        if len(data) > limit:
            high = middle
        else:
            low = middle
            best = max(best, (middle, data), key=lambda found: len(found[1]))
    return best


def _draw(rows: Sequence[Sequence[_Tile]], side: int) -> bytes:
    """A JPEG of quality 95: tiles at twice their size, nearest pixel, with a line of text under each."""
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
