"""Show rate and distortion of the model's files: the curves of `evaluate --rd`, and JPEG files of as many bytes."""

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PilImage
from tqdm import tqdm

from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.evaluation.evaluate import compare, mean_defined
from latent_codec.evaluation.rate_distortion import anchors, plot
from latent_codec.evaluation.rate_distortion.anchors import JPEG
from latent_codec.evaluation.rate_distortion.report import RD_PROTOCOL, RateDistortionReport
from latent_codec.evaluation.report.page import METRICS, EmbeddedImage, Section, embed, left_out, picture, written
from latent_codec.evaluation.report.pictures import SIDE, middle
from latent_codec.images.geometry import Image, as_shown, crop, pad
from latent_codec.images.sources import Source
from latent_codec.images.write import rgb_pixels, to_pil
from latent_codec.inference.runner import Runner
from latent_codec.metrics.bjontegaard import Delta
from latent_codec.metrics.lpips import LPIPS
from latent_codec.prior.quantizer import STEP_ONE

QUALITIES = range(1, 96)
"""JPEG qualities that are tried."""


def rate_distortion_section(report: RateDistortionReport | None) -> Section:
    """Show the curves, if `evaluate --rd` measured them."""
    name, title = "rate_distortion", "Rate and distortion"
    if report is None:
        return left_out(name, title, "it was not asked for; add --rd")
    data = plot.png(report)
    with PilImage.open(io.BytesIO(data)) as opened:
        size = opened.size
    ours = report.codecs[0]
    alt = f"Distortion against bits per pixel: {', '.join(report.codecs)}; the table has the values."
    named = [(f"against {comparison.anchor}", comparison) for comparison in report.against]
    named += [(f"refined, against {comparison.anchor}", comparison) for comparison in report.refined_against]
    view = {
        "plot": embed(data, "png", size, alt),
        "protocol": report.protocol["delta_rate"],
        "delta_head": ["", *(METRICS[name] for name in (named[0][1].delta_rates if named else ()))],
        "deltas": [(words, *map(_percent, comparison.delta_rates.values())) for words, comparison in named],
        "head": (f"{ours} prior", "bits per pixel", *METRICS.values()),
        "points": [
            (point.setting, written(point.bpp), *(written(point.distortion.get(name)) for name in METRICS))
            for point in report.points
            if point.setting.codec == ours
        ],
    }
    records = {
        "points": [point.json() for point in report.points],
        "delta_rates": {c.anchor: c.json()["delta_rates"] for c in report.against},
        "refined_delta_rates": {c.anchor: c.json()["delta_rates"] for c in report.refined_against},
        "protocol": report.protocol,
    }
    return Section(name, title, view, records=records)


def _percent(delta: Delta) -> str:
    return f"none: {delta.reason}" if delta.percent is None else f"{delta.percent:+.1f} %"


class CodedImage(NamedTuple):
    """Hold one file of an image and what it decodes to."""

    codec: str
    setting: str
    bytes: int
    pixels: torch.Tensor  # (3, h, w) uint8
    distortion: dict[str, float | None]

    def json(self) -> dict[str, Any]:
        """Return size and distortion as JSON values."""
        return {"bytes": self.bytes, "setting": self.setting} | self.distortion


def jpeg_at_equal_bytes(
    runner: Runner, sources: Sequence[Source], lpips: LPIPS | None, shown: Sequence[str], *, quiet: bool
) -> Section:
    """Compare files over all images; those named in `shown` are shown, if they have a JPEG that is small enough."""
    name, title, codec = "jpeg", "JPEG at equal bytes", runner.codec
    if codec.config.classes:
        return left_out(name, title, "no .lc file holds the class that this model has to be told")
    if codec.priors is None:
        return left_out(name, title, "the model has no prior, so it makes no .lc files; `export --data` gives it one")
    coder = StreamCodec(codec, runner.options.device)
    records: list[dict[str, Any]] = []
    pairs: list[list[tuple[float, dict[str, float | None]]]] = []
    strips: list[tuple[str, list[EmbeddedImage]]] = []
    for source in tqdm(sources, "JPEG", unit="image", disable=quiet or None):
        image = source.read()
        area = image.geometry.width * image.geometry.height
        ours, jpeg = _code(image, coder, runner, lpips)
        found = None if jpeg is None else jpeg.json()
        records.append({"image": source.name, "pixels": area, "ours": ours.json(), "jpeg": found})
        if jpeg is not None:
            pairs.append([(8 * file.bytes / area, file.distortion) for file in (ours, jpeg)])
            if source.name in shown:
                strips.append((source.name, _strip(source.name, image.pixels, [ours, jpeg])))
    names = ("this model", "JPEG")
    means = [_mean(name, [pair[i] for pair in pairs]) for i, name in enumerate(names)] if pairs else []
    metrics = [name for name in METRICS if means and name in means[0]]
    view = {
        "prior": coder.prior.kind,
        "qualities": f"{QUALITIES[0]} to {QUALITIES[-1]}",
        "settings": JPEG.settings(),
        "pairs": len(pairs),
        "missing": len(records) - len(pairs),
        "head": ["", "bits per pixel", *(METRICS[name] for name in metrics)],
        "means": [(mean["name"], written(mean["bpp"]), *(written(mean[name]) for name in metrics)) for mean in means],
        "strips": strips,
    }
    protocol = {name: RD_PROTOCOL[name] for name in ("bpp", "decoded", "psnr", "ms_ssim")}
    protocol |= {} if lpips is None else {"lpips": lpips.protocol}
    return Section(name, title, view, records={"means": means, "protocol": protocol, "images": records})


def code_image(runner: Runner, coder: StreamCodec, image: Image, step: int) -> tuple[int, torch.Tensor]:
    """Return the bytes of our file at a step (see `step_code`), and the pixels (3, h, w) uint8 that it decodes to."""
    latents = runner.encode([pad(image.pixels, coder.codec.factor)]).coded[0]
    (file,) = coder.compress([(coder.scale(latents, step, None), image.geometry)])
    decoded = crop(runner.decode_uint8([coder.dequantize(file.quantized)])[0], image.geometry)
    return len(file.data), as_shown(decoded, image.geometry)


def _code(
    image: Image, coder: StreamCodec, runner: Runner, lpips: LPIPS | None
) -> tuple[CodedImage, CodedImage | None]:
    """Return our file of an image, and the JPEG of as many bytes."""

    def coded(codec: str, setting: str, size: int, pixels: torch.Tensor) -> CodedImage:
        distortion = compare(image.pixels[None], pixels[None], lpips)
        return CodedImage(codec, setting, size, pixels, distortion)

    ours = coded("this model", "step 1", *code_image(runner, coder, image, STEP_ONE))
    found = anchors.largest_within(JPEG, to_pil(image.pixels, image.geometry), ours.bytes, QUALITIES)
    if found is None:
        return ours, None
    quality, data = found
    pixels = rgb_pixels(anchors.decode(JPEG, data, image.geometry.mode))
    return ours, coded("JPEG", f"quality {quality}", len(data), pixels)


def _strip(name: str, original: torch.Tensor, files: Sequence[CodedImage]) -> list[EmbeddedImage]:
    images = [picture(middle(original, SIDE, SIDE), f"Original of {name}", "original")]
    for file in files:
        words = f"{file.codec}, {file.setting}: {file.bytes:,} bytes, {written(file.distortion['psnr'])} dB"
        images.append(picture(middle(file.pixels, SIDE, SIDE), f"{name} as {words}", words))
    return images


def _mean(name: str, files: Sequence[tuple[float, dict[str, float | None]]]) -> dict[str, Any]:
    """Average rate and distortion over images."""
    metrics = [metric for metric in METRICS if metric in files[0][1]]
    distortion = {metric: mean_defined([values[metric] for _, values in files]) for metric in metrics}
    return {"name": name, "bpp": float(np.mean([bpp for bpp, _ in files]))} | distortion
