"""Compare a model with baselines on the same images: PCA of its latent size, and other models."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec.evaluation.evaluate import EvaluationReport, compare, mean_defined
from latent_codec.evaluation.report import pca
from latent_codec.evaluation.report.page import Section, is_continuous, is_gaussian, written
from latent_codec.images.geometry import in_channels, in_rgb, pad
from latent_codec.images.sources import Source, find_images
from latent_codec.inference.runner import Runner
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec

_COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}

Reconstruct = Callable[[torch.Tensor], torch.Tensor]
"""(3, h, w) uint8 to its reconstruction, of the same size."""

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Images and their reconstructions."""


class Baseline(NamedTuple):
    """Hold what one way to reconstruct images from latents reached."""

    name: str
    how: str
    numbers_per_pixel: float
    """Latent numbers, not bits."""
    distortion: dict[str, float | None]
    """Means over images, by metric; None where it is undefined."""

    def json(self) -> dict[str, Any]:
        """Return the baseline as JSON values."""
        return {"name": self.name, "how": self.how, "numbers_per_pixel": self.numbers_per_pixel} | self.distortion


class BaselineComparison:
    """Reconstruct images with a model and its baselines, and measure each."""

    def __init__(
        self,
        runner: Runner,
        sources: Sequence[Source],
        evaluation: EvaluationReport,
        *,
        lpips: LPIPS | None = None,
        quiet: bool = False,
    ) -> None:
        """Take the images and what `evaluate` measured of the model on them."""
        self.runner, self.sources, self.evaluation = runner, sources, evaluation
        self._lpips, self._quiet = lpips, quiet
        self.names = [name for name in _COLUMNS if name in evaluation.summary]

    def section(self, others: Sequence[tuple[str, Runner]], data: str | None) -> Section:
        """Show models by name and PCA, fitted to `data` or half the images; raises `UserError` for bad `data`."""
        codec = self.runner.codec
        methods, reason = [self._this_model()], why_no_pca(codec, self.sources, data)
        if reason is None:
            how, pairs = self._pca_pairs(data)
            methods.append(Baseline("PCA", how, latent_density(codec), self._distortion(pairs)))
        for name, other in others:
            how = f"model {other.codec.model_id[:12]}, its mode decoded"
            found = self._distortion(self._coded_pairs(other))
            methods.append(Baseline(name, how, latent_density(other.codec), found))
        rows = [
            (m.name, written(m.numbers_per_pixel), *(written(m.distortion[n]) for n in self.names), m.how)
            for m in methods
        ]
        view = {
            "reason": reason,
            "alone": not others,
            "unequal": [m.name for m in methods if not math.isclose(m.numbers_per_pixel, latent_density(codec))],
            "head": ["", "numbers per pixel", *(_COLUMNS[name] for name in self.names), "how"],
            "methods": rows,
        }
        protocol = {name: self.evaluation.protocol[name] for name in self.names}
        records = {"methods": [m.json() for m in methods], "pca_left_out": reason, "protocol": protocol}
        return Section("baselines", "Baselines at equal latent size", view, records=records)

    def _this_model(self) -> Baseline:
        """Take what `evaluate` measured, unless it went through files, which round."""
        density = latent_density(self.runner.codec)
        if is_gaussian(self.runner.codec):
            found = {name: self.evaluation.summary[name] for name in self.names}
            return Baseline("this model", "the mode as `evaluate` stores it, decoded", density, found)
        found = self._distortion(self._coded_pairs(self.runner))
        return Baseline("this model", "its latents, decoded", density, found)

    def _pca_pairs(self, data: str | None) -> tuple[str, Pairs]:
        """Return what PCA was fitted to, in words, and its reconstructions."""
        codec = self.runner.codec
        patch, components, channels = codec.factor, codec.config.latent_channels, codec.config.image_channels
        words = f"{components} components of {patch}x{patch} patches, closed form, fitted to "

        def fit(images: Sequence[Source]) -> Reconstruct:
            model = pca.fit((in_channels(x, channels) for x in self._pixels(images, "PCA")), patch, components)
            return lambda x: in_rgb(model.reconstruct(in_channels(x, channels)))

        if data is not None:
            fitted = find_images(data)
            where = Path(data).name or data
            return f"{words}{len(fitted)} images of {where}", self._pairs(self.sources, fit(fitted))
        halves = self.sources[::2], self.sources[1::2]
        fitted = [fit(half) for half in halves]

        def pairs() -> Pairs:
            for half, other in zip(halves, reversed(fitted), strict=True):
                yield from self._pairs(half, other)

        return f"{words}every other image and measured on the rest, then the other way round", pairs()

    def _pairs(self, sources: Sequence[Source], reconstruct: Reconstruct) -> Pairs:
        for pixels in self._pixels(sources, "PCA"):
            yield pixels, reconstruct(pixels)

    def _coded_pairs(self, runner: Runner) -> Pairs:
        codec = runner.codec
        for source, pixels in zip(self.sources, self._pixels(self.sources, "baseline"), strict=True):
            labels = codec.class_numbers([source.label])
            z = runner.encode([pad(pixels, codec.factor)], labels).mode()
            yield pixels, runner.decode_uint8([z[0]], labels)[0, :, : pixels.shape[1], : pixels.shape[2]]

    def _pixels(self, sources: Sequence[Source], what: str) -> Iterator[torch.Tensor]:
        for source in tqdm(sources, what, unit="image", disable=self._quiet or None):
            yield source.read().pixels

    def _distortion(self, pairs: Pairs) -> dict[str, float | None]:
        found = [compare(x[None], y[None], self._lpips) for x, y in pairs]
        return {name: mean_defined([values[name] for values in found]) for name in found[0]}


def latent_density(codec: Codec) -> float:
    """Return the latent numbers per pixel."""
    return codec.config.latent_channels / codec.factor**2


def why_no_pca(codec: Codec, sources: Sequence[Source], data: str | None) -> str | None:
    """Return why there is no PCA of the model's latent size, None if there is one."""
    if not is_continuous(codec):
        return "the model's latents are codes, and PCA's components are numbers"
    values = codec.config.image_channels * codec.factor**2
    if values > pca.LARGEST:
        return f"a patch of {codec.factor}x{codec.factor} pixels has {values} values, more than {pca.LARGEST}"
    if codec.config.latent_channels >= values:
        return f"{codec.config.latent_channels} numbers for each patch of {values} values lose nothing"
    if data is None and len(sources) < 2:
        return "one image cannot be split into a half to fit and a half to measure; give --baseline-data"
    return None
