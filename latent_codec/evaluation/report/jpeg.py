"""The model's files beside JPEG files of as many bytes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PilImage
from tqdm import tqdm

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.evaluation.evaluate import compare, mean_defined
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.rate_distortion.anchors import PEERS
from latent_codec.evaluation.rate_distortion.report import RD_PROTOCOL
from latent_codec.evaluation.report.html import Html, Picture, join, name_of, paragraphs, strip, table
from latent_codec.evaluation.report.page import METRICS, Section, left_out, written
from latent_codec.evaluation.report.pictures import SIDE, middle
from latent_codec.images.geometry import Image, as_shown, crop, pad
from latent_codec.images.sources import Source
from latent_codec.images.write import rgb_pixels, to_pil
from latent_codec.inference.runner import Runner
from latent_codec.metrics.lpips import LPIPS
from latent_codec.prior.quantizer import STEP_ONE

NAME, TITLE = "jpeg", "JPEG at equal bytes"

_JPEG = next(peer for peer in PEERS if peer.name == "JPEG")
_QUALITIES = range(1, 96)


class File(NamedTuple):
    """Of one image."""

    bytes: int
    setting: str
    distortion: dict[str, float | None]

    def json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "setting": self.setting} | self.distortion


class Row(NamedTuple):
    """One image's two files; no JPEG where even the smallest is larger than ours."""

    name: str
    pixels: int
    ours: File
    jpeg: File | None

    def json(self) -> dict[str, Any]:
        jpeg = None if self.jpeg is None else self.jpeg.json()
        return {"image": self.name, "pixels": self.pixels, "ours": self.ours.json(), "jpeg": jpeg}


class Mean(NamedTuple):
    """Over images."""

    name: str
    bpp: float
    distortion: dict[str, float | None]

    def json(self) -> dict[str, Any]:
        return {"name": self.name, "bpp": self.bpp} | self.distortion


def jpeg_at_equal_bytes(
    runner: Runner,
    sources: Sequence[Source],
    lpips: LPIPS | None,
    names: Sequence[str],
    *,
    quiet: bool,
) -> Section:
    """Over all images; those of `names` that have a JPEG are shown."""
    codec = runner.codec
    if codec.config.classes:
        return left_out(NAME, TITLE, "no .lc file holds the class that this model has to be told")
    if codec.priors is None:
        return left_out(NAME, TITLE, "the model has no prior, so it makes no .lc files; `export --data` gives it one")
    coder = StreamCodec(codec, runner.options.device)
    rows: list[Row] = []
    strips: list[Html] = []
    for source in tqdm(sources, "JPEG", unit="image", disable=quiet or None):
        image = source.read()
        row, ours, jpeg = _measure(source.name, image, coder, runner, lpips)
        rows.append(row)
        if jpeg is not None and source.name in names:
            strips.append(_strip(row, image.pixels, ours, jpeg))
    pairs = [(row, row.jpeg) for row in rows if row.jpeg is not None]
    missing = len(rows) - len(pairs)
    words = paragraphs(
        f"For each image the file at --step 1 ({coder.prior.kind} prior), and of the JPEGs of "
        f"qualities {_QUALITIES[0]} to {_QUALITIES[-1]} the largest that has no more bytes ({_JPEG.settings()}). Whole "
        f"files, decoded again; means over {len(pairs)} images.",
        *([f"{missing} images are in no mean: their smallest JPEG is larger than our file."] if missing else []),
    )
    means = _means(pairs)
    records = {
        "means": [m.json() for m in means],
        "protocol": _protocol(lpips),
        "images": [row.json() for row in rows],
    }
    return Section(NAME, TITLE, join(words, _table(means), *strips), [], records)


def _protocol(lpips: LPIPS | None) -> dict[str, str]:
    of_lpips = {} if lpips is None else {"lpips": lpips.protocol}
    return {name: RD_PROTOCOL[name] for name in ("bpp", "decoded", "psnr", "ms_ssim")} | of_lpips


class Jpeg(NamedTuple):
    quality: int
    data: bytes


def closest_below(image: PilImage.Image, limit: int) -> Jpeg | None:
    """The largest JPEG of up to `limit` bytes; None if there is none.

    Every quality is tried until files have twice the bytes: their sizes are nearly monotone, but not quite.
    """
    best: Jpeg | None = None
    for quality in _QUALITIES:
        data = anchors.encode(_JPEG, image, quality)
        if len(data) > 2 * limit:
            break
        if len(data) <= limit and (best is None or len(data) >= len(best.data)):
            best = Jpeg(quality, data)
    return best


def _measure(
    name: str, image: Image, coder: StreamCodec, runner: Runner, lpips: LPIPS | None
) -> tuple[Row, torch.Tensor, torch.Tensor | None]:
    """An image's row, and both files decoded, (3, h, w) uint8."""

    def file(size: int, setting: str, pixels: torch.Tensor) -> File:
        return File(size, setting, compare(image.pixels[None], pixels[None], lpips, runner.options.device))

    area = image.geometry.width * image.geometry.height
    data, decoded = _ours(image, coder, runner)
    ours = file(len(data), "step 1", decoded)
    found = closest_below(to_pil(image.pixels, image.geometry), len(data))
    if found is None:
        return Row(name, area, ours, None), decoded, None
    pixels = rgb_pixels(anchors.decode(_JPEG, found.data, image.geometry.mode))
    return Row(name, area, ours, file(len(found.data), f"quality {found.quality}", pixels)), decoded, pixels


def _ours(image: Image, coder: StreamCodec, runner: Runner) -> tuple[bytes, torch.Tensor]:
    """An image's file and what `decode` would write of it, (3, h, w) uint8."""
    coded = runner.encode([pad(image.pixels, coder.codec.factor)]).coded[0]
    (file,) = coder.compress([(coder.scale(coded, STEP_ONE, None), image.geometry)])
    decoded = crop(runner.decode_uint8([coder.dequantize(file.quantized)])[0], image.geometry)
    return file.data, as_shown(decoded, image.geometry)


def _strip(row: Row, original: torch.Tensor, ours: torch.Tensor, jpeg: torch.Tensor) -> Html:
    pictures = [Picture(middle(original, SIDE, SIDE), "original", f"Original of {row.name}")]
    for pixels, file, kind in ((ours, row.ours, "this model"), (jpeg, row.jpeg, "JPEG")):
        assert file is not None
        words = f"{kind}, {file.setting}: {file.bytes:,} bytes, {written(file.distortion['psnr'])} dB"
        pictures.append(Picture(middle(pixels, SIDE, SIDE), words, f"{row.name} as {words}"))
    return strip(name_of(row.name), pictures)


def _means(pairs: Sequence[tuple[Row, File]]) -> list[Mean]:
    """Over images that have both files; none without any."""
    if not pairs:
        return []
    found = []
    for name, files in (("this model", [row.ours for row, _ in pairs]), ("JPEG", [file for _, file in pairs])):
        bpp = float(np.mean([8 * file.bytes / row.pixels for (row, _), file in zip(pairs, files, strict=True)]))
        names = [metric for metric in METRICS if metric in files[0].distortion]
        distortion = {metric: mean_defined([file.distortion[metric] for file in files]) for metric in names}
        found.append(Mean(name, bpp, distortion))
    return found


def _table(means: Sequence[Mean]) -> Html:
    if not means:
        return Html()
    rows: list[tuple[object, ...]] = [(m.name, written(m.bpp), *map(written, m.distortion.values())) for m in means]
    return table(("", "bits per pixel", *(METRICS[name] for name in means[0].distortion)), rows)
