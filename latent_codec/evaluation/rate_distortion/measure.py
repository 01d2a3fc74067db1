"""Measure rate and distortion of files at many settings, decoded from their bytes, with the anchors beside them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PilImage
from tqdm import tqdm

from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.refinement import Refiner
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader, dither_seed
from latent_codec.errors import UserError
from latent_codec.evaluation.evaluate import check_results, compare, describe_evaluation
from latent_codec.evaluation.rate_distortion import anchors as anchor_codecs
from latent_codec.evaluation.rate_distortion import report as rd
from latent_codec.evaluation.rate_distortion.anchors import ANCHORS, Anchor
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Image, crop, pad
from latent_codec.images.sources import ListOptions, Source, list_images
from latent_codec.images.write import rgb_pixels, to_pil
from latent_codec.inference.runner import Runner
from latent_codec.metrics.bjontegaard import check_extra
from latent_codec.metrics.lpips import LPIPS, LPIPSOptions
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.prior.quantizer import Scaled, step_code
from latent_codec.storage.files import atomic_path, make_folder, write_text

RESULTS, PLOT = "rd.json", "rd.png"

DITHERED_STEP = 1.0
"""Step of the rows with dither, whose error has the variance of the posterior."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateDistortionOptions:
    """Choose the settings of the curves."""

    steps: Sequence[float] = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6)
    """Quantiser steps."""
    refine: int = 0
    """Rounds of refinement of further rows of the best prior, without dither; 0 for no such rows."""
    sample: int = 0
    """Seed of the dither of the rows that have one."""
    lpips: LPIPSOptions | None = None
    anchors: Sequence[Anchor] = ANCHORS
    """Codecs to compare with; those that Pillow was built without are left out with a note."""
    command: str = ""
    """Command that the report says it came from."""
    search: ListOptions = ListOptions()

    def __post_init__(self) -> None:
        if not self.steps or len(set(self.steps)) != len(self.steps):
            raise UserError(f"--steps {' '.join(f'{s:g}' for s in self.steps)}: give at least one, each once")
        for step in self.steps:
            step_code(step)  # refuses what no stream can have


def rate_distortion(
    runner: Runner, where: str | Path, options: RateDistortionOptions, *, out: Path | None = None, quiet: bool = False
) -> rd.RateDistortionReport:
    """Measure the codec at every step, and the anchors at their qualities, on the images at `where`.

    `out` keeps rd.json and rd.png; nothing else is written. Images that cannot be read, or that an anchor refuses, are
    reported and left out of all curves. Raises `UserError` before any work if the packages of the extra `rd` are
    missing, the model has no prior or `out` cannot be written into or holds other files of these names, and later if no
    image could be used.
    """
    check_extra()
    if out is not None:
        make_folder(out)
        check_results(out / RESULTS, {"about", "protocol", "settings"}, out / PLOT)
    ours = _OwnFiles(runner, options)
    lpips = None if options.lpips is None else options.lpips.load(runner.options.device)
    anchors = anchor_codecs.available(options.anchors)
    search = options.search if out is None else options.search.without(out, out / PLOT)
    listing, summary = list_images(where, search), Summary("evaluated")
    sources = listing.sources
    summary.begin(listing, len(sources))
    images: list[rd.ImageRates] = []
    for source in tqdm(sources, "evaluate", unit="image", disable=quiet or None):
        try:
            images.append(_measure_image(source, ours, anchors, lpips))
        except UserError as error:
            summary.fail(source.name, error)
    if not images:
        raise UserError(f"{where}: none of the {summary.found} images could be used")
    about = describe_evaluation(runner, where, len(images))
    about["versions"] |= rd.package_versions()
    missing = sorted({anchor.name for anchor in options.anchors} - {anchor.name for anchor in anchors})
    report = rd.RateDistortionReport(
        about=about | {"stream_ids": ours.stream_ids, "command": options.command},
        protocol=rd.RD_PROTOCOL | ({"lpips": lpips.protocol} if lpips else {}),
        settings=rd.codec_settings(ours.stream_ids, options.refine, anchors),
        notes=[
            *(f"{name} left out: this Pillow was built without it" for name in missing),
            *([f"left out: {listing.left_out}"] if listing.left_out.total else []),
        ],
        images=images,
        failures=summary.failures,
    )
    if out is not None:
        _write(report, out)
    return report


def _write(report: rd.RateDistortionReport, folder: Path) -> None:
    from latent_codec.evaluation.rate_distortion.plot import png  # matplotlib is optional

    write_text(folder / RESULTS, json.dumps(report.json(), indent=1, allow_nan=False) + "\n")
    with atomic_path(folder / PLOT) as temporary:
        temporary.write_bytes(png(report))


class _DecodedFile(NamedTuple):
    setting: rd.CodecSetting
    size: int  # bytes
    ideal_bits: float | None
    pixels: torch.Tensor  # (3, h, w) uint8; one object for all files that decode to the same latents


class _OwnFiles:
    """Write and decode the codec's own files of one image after another."""

    def __init__(self, runner: Runner, options: RateDistortionOptions) -> None:
        codec, device = runner.codec, runner.options.device
        self.runner, self._sample = runner, options.sample
        check_channels(codec)
        check_unconditional(codec, "a .lc file")
        if (kind := codec.config.bottleneck.kind) != "gaussian":
            raise UserError(
                f"--rd sets files beside the KL of a posterior, which a {kind} bottleneck has not; leave it out"
            )
        self._coders = [StreamCodec(codec, device)]  # of the best prior; refuses a model without any
        self._refiner = Refiner(self._coders[0], runner, options.refine)
        if self._coders[0].prior.kind != "factorized":
            self._coders.append(StreamCodec(codec, device, "factorized"))
        self._reader = StreamReader(codec, device)
        self._settings = [(step, False) for step in sorted(options.steps)] + [(DITHERED_STEP, True)]

    @property
    def stream_ids(self) -> dict[str, str]:
        """Return the stream id of each prior, the best one first."""
        return {coder.prior.kind: coder.stream_id.hex() for coder in self._coders}

    def encode(self, image: Image) -> tuple[torch.Tensor, float]:
        """Return the posterior's mean (z, h, w) and its KL in bits."""
        posterior = self.runner.encode([pad(image.pixels, self.runner.codec.factor)])
        return posterior.mean[0], posterior.kl().item() / np.log(2)

    def files(self, image: Image, mean: torch.Tensor, name: str) -> Iterator[_DecodedFile]:
        """Yield a file of every setting; files in a row that hold equal latents are decoded once."""
        latents, pixels = None, None
        for setting, scaled, coder in self._scaled(image, mean, name):
            (coded,) = coder.compress([(scaled, image.geometry)])
            read = self._read(coded.data)
            if latents is None or pixels is None or not torch.equal(latents, read):  # two priors may round alike
                decoded = crop(self.runner.decode_uint8([read])[0], image.geometry)
                latents, pixels = read, rgb_pixels(to_pil(decoded, image.geometry))
            yield _DecodedFile(setting, len(coded.data), coded.ideal_bits, pixels)

    def _scaled(
        self, image: Image, mean: torch.Tensor, name: str
    ) -> Iterator[tuple[rd.CodecSetting, Scaled, StreamCodec]]:
        for step, dithered in self._settings:
            seed = dither_seed(self._sample, name) if dithered else None
            for coder in self._coders:
                setting = rd.CodecSetting(coder.prior.kind, "step", step, dithered)
                yield setting, coder.scale(mean, step_code(step), seed), coder
        pixels = crop(image.pixels, image.geometry)
        for step, dithered in self._settings if self._refiner.rounds else ():
            if not dithered:
                scaled = self._refiner.scale(mean, pixels, step_code(step), seed=None)
                yield rd.CodecSetting(rd.REFINED, "step", step, False), scaled, self._refiner.coder

    def _read(self, data: bytes) -> torch.Tensor:
        """Return the latents (z, h, w) of a file's bytes with all checks of a reader."""
        stream = unpack(data)
        self._reader.check(stream)
        (latents,) = self._reader.decompress([stream])
        if isinstance(latents, UserError):
            raise RuntimeError(f"a file just written cannot be read: {latents}")
        return latents


def _anchor_files(original: PilImage.Image, anchors: Sequence[Anchor]) -> Iterator[_DecodedFile]:
    for anchor in anchors:
        for quality in anchor.qualities:
            data = anchor_codecs.encode(anchor, original, quality)
            pixels = rgb_pixels(anchor_codecs.decode(anchor, data, original.mode))
            yield _DecodedFile(rd.CodecSetting(anchor.name, "quality", quality, False), len(data), None, pixels)


def _measure_image(source: Source, ours: _OwnFiles, anchors: Sequence[Anchor], lpips: LPIPS | None) -> rd.ImageRates:
    """Measure all files of one image; raises `UserError` if it cannot be read or a codec refuses it."""
    image = source.read()
    area = image.geometry.width * image.geometry.height
    mean, kl_bits = ours.encode(image)
    original = to_pil(image.pixels, image.geometry)
    rows, last, distortion = [], None, {}
    for setting, size, ideal_bits, pixels in chain(
        ours.files(image, mean, source.name), _anchor_files(original, anchors)
    ):
        if pixels is not last:
            last, distortion = pixels, compare(image.pixels[None], pixels[None], lpips)
        ideal_bpp = None if ideal_bits is None else ideal_bits / area
        rows.append(rd.RatePoint(setting, 8 * size / area, ideal_bpp, distortion, size))
    return rd.ImageRates(source.name, area, kl_bits / area, rows)
