"""Rate against distortion: files of many settings, decoded from their bytes; JPEG, WebP and AVIF beside them."""

from collections.abc import Iterator, Sequence
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
from latent_codec.evaluation.evaluate import compare
from latent_codec.evaluation.rate_distortion import anchors
from latent_codec.evaluation.rate_distortion.anchors import Peer
from latent_codec.evaluation.rate_distortion.report import REFINED, Record, Report, Row, Setting, report
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Geometry, Image, crop, pad
from latent_codec.images.sources import Source, find_images
from latent_codec.images.write import rgb_pixels, to_pil
from latent_codec.inference.runner import Runner
from latent_codec.metrics.bjontegaard import check_extra
from latent_codec.metrics.lpips import LPIPS, Net
from latent_codec.model.checks import check_channels, check_unconditional
from latent_codec.prior.quantizer import step_code
from latent_codec.storage.files import make_folder

DITHERED_STEP = 1.0
"""Where dither is tried: its error then has the variance of the posterior."""


def rate_distortion(
    runner: Runner,
    where: str | Path,
    *,
    steps: Sequence[float],
    refine: int = 0,
    sample: int,
    out: Path | None,
    lpips_net: Net | None,
    lpips_backbone: Path | None,
    command: str,
    quiet: bool = False,
) -> Report:
    """Measure the codec at every step, and the peers at their qualities, on the images at `where`.

    With `refine` there are also rows of the best prior after so many rounds of `refining.Refiner`, without dither.
    `sample` seeds the dither of the rows that have one. `out` keeps rd.json and rd.png; nothing else is written.
    `command` is what the report says it came from. Images that cannot be read, or that a peer refuses, are reported
    and left out of all curves. Raises `UserError` before any work if the packages of the extra `rd` are not there, the
    model has no prior, a step is out of range or `out` cannot be written into, and later if no image could be used.
    """
    check_extra()
    if out is not None:
        make_folder(out)
    ours = _Ours(runner, steps, refine, sample)
    lpips = None if lpips_net is None else LPIPS(lpips_net, lpips_backbone).to(runner.options.device)
    peers = anchors.available()
    sources = find_images(where)
    summary = Summary("evaluated", found=len(sources))
    records: list[Record] = []
    for source in tqdm(sources, "evaluate", unit="image", disable=quiet or None):
        try:
            records.append(_measure(source, ours, peers, lpips, runner.options.device))
        except UserError as error:
            summary.fail(source.name, error)
    if not records:
        raise UserError(f"{where}: none of the {summary.found} images could be used")
    result = report(runner, where, records, ours.stream_ids, refine, peers, lpips, command, summary.failures)
    if out is not None:
        result.write(out)
    return result


class _File(NamedTuple):
    """What one file took."""

    setting: Setting
    size: int  # bytes
    ideal_bits: float | None


class _Version(NamedTuple):
    """One decoded image and the files that decode to it."""

    decoded: torch.Tensor  # (3, h, w) uint8
    files: list[_File]


class _Ours:
    """The codec's own files of one image after another."""

    def __init__(self, runner: Runner, steps: Sequence[float], refine: int, sample: int) -> None:
        if not steps or len(set(steps)) != len(steps):
            raise UserError(f"--steps {' '.join(f'{s:g}' for s in steps)}: give at least one, each once")
        self._runner, self.codec, self.sample = runner, runner.codec, sample
        codec, device = runner.codec, runner.options.device
        check_channels(codec)
        check_unconditional(codec, "a .lc file")
        if (kind := codec.config.bottleneck.kind) != "gaussian":
            raise UserError(
                f"--rd sets files beside the KL of a posterior, which a {kind} bottleneck has not; leave it out"
            )
        self._coders = [StreamCodec(codec, device)]  # of the best prior; refuses a model without any
        self._refiner = Refiner(self._coders[0], self._runner, refine)
        if self._coders[0].prior.kind != "factorized":
            self._coders.append(StreamCodec(codec, device, "factorized"))
        self._reader = StreamReader(codec, device)
        self._settings = [(step, False) for step in sorted(steps)] + [(DITHERED_STEP, True)]
        for step in steps:
            step_code(step)  # refuses what no stream can have

    @property
    def stream_ids(self) -> dict[str, str]:
        return {coder.prior.kind: coder.stream_id.hex() for coder in self._coders}

    def encode(self, image: Image) -> tuple[torch.Tensor, float]:
        """The posterior's mean (z, h, w) and its KL in bits."""
        posterior = self._runner.encode([pad(image.pixels, self.codec.factor)])
        return posterior.mean[0], posterior.kl().item() / np.log(2)

    def versions(self, mean: torch.Tensor, image: Image, name: str) -> Iterator[_Version]:
        geometry = image.geometry
        for step, dithered in self._settings:
            seed = dither_seed(self.sample, name) if dithered else None
            found: list[tuple[torch.Tensor, list[_File]]] = []  # latents, and the files that hold them
            for coder in self._coders:
                (coded,) = coder.compress([(coder.scale(mean, step_code(step), seed), geometry)])
                file = _File(Setting(coder.prior.kind, "step", step, dithered), len(coded.data), coded.ideal_bits)
                latents = self._read(coded.data)
                same = [files for other, files in found if torch.equal(other, latents)]
                if same:  # two priors that round alike
                    same[0].append(file)
                else:
                    found.append((latents, [file]))
            for latents, files in found:
                yield _Version(self._decode(latents, geometry), files)
        if self._refiner.rounds:
            yield from self._refined(mean, image)

    def _refined(self, mean: torch.Tensor, image: Image) -> Iterator[_Version]:
        geometry, pixels = image.geometry, crop(image.pixels, image.geometry)
        for step in (step for step, dithered in self._settings if not dithered):
            scaled = self._refiner.scale(mean, pixels, step_code(step), seed=None)
            (coded,) = self._refiner.coder.compress([(scaled, geometry)])
            file = _File(Setting(REFINED, "step", step, False), len(coded.data), coded.ideal_bits)
            yield _Version(self._decode(self._read(coded.data), geometry), [file])

    def _read(self, data: bytes) -> torch.Tensor:
        """Latents (z, h, w) from a file's bytes, as any reader of it gets them."""
        stream = unpack(data)
        self._reader.check(stream)
        (latents,) = self._reader.decompress([stream])
        if isinstance(latents, UserError):
            raise RuntimeError(f"a file just written cannot be read: {latents}")
        return latents

    def _decode(self, latents: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        pixels = self._runner.decode_uint8([latents])[0]
        return rgb_pixels(to_pil(crop(pixels, geometry), geometry))


def _peer_versions(original: PilImage.Image, peers: list[Peer]) -> Iterator[_Version]:
    for peer in peers:
        for quality in peer.qualities:
            data = anchors.encode(peer, original, quality)
            decoded = rgb_pixels(anchors.decode(peer, data, original.mode))
            yield _Version(decoded, [_File(Setting(peer.name, "quality", quality, False), len(data), None)])


def _measure(source: Source, ours: _Ours, peers: list[Peer], lpips: LPIPS | None, device: str) -> Record:
    """Everything about one image; raises `UserError` if it cannot be read or a codec refuses it."""
    image = source.read()
    area = image.geometry.width * image.geometry.height
    mean, kl_bits = ours.encode(image)
    rows = []
    for versions in (
        ours.versions(mean, image, source.name),
        _peer_versions(to_pil(image.pixels, image.geometry), peers),
    ):
        for decoded, files in versions:
            distortion = compare(image.pixels[None], decoded[None], lpips, device)
            for setting, size, ideal_bits in files:
                ideal_bpp = None if ideal_bits is None else ideal_bits / area
                rows.append(Row(setting, size, 8 * size / area, ideal_bpp, distortion))
    return Record(source.name, area, kl_bits / area, rows)
