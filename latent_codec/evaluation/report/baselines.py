"""What a model is measured against on the same images: PCA and other models; JPEG files of as many bytes."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec.evaluation.evaluate import Report, compare, mean_defined
from latent_codec.evaluation.report import pca
from latent_codec.evaluation.report.html import Html, join, name_of, paragraphs, table
from latent_codec.evaluation.report.page import Section, is_continuous, is_gaussian, written
from latent_codec.images.geometry import in_channels, in_rgb, pad
from latent_codec.images.sources import Source, find_images
from latent_codec.inference.runner import Runner
from latent_codec.metrics.lpips import LPIPS
from latent_codec.model.codec import Codec

_COLUMNS = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS"}

Reconstruct = Callable[[torch.Tensor], torch.Tensor]
"""(3, h, w) uint8 to what comes back, of the same size."""

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""Images and what came back."""


class Method(NamedTuple):
    """One way to reconstruct images from as many numbers, and what it reached."""

    name: str
    how: str
    numbers_per_pixel: float
    """Latent numbers, not bits."""
    distortion: dict[str, float | None]
    """Means over images, by metric; None where it is not defined."""

    def json(self) -> dict[str, Any]:
        return {"name": self.name, "how": self.how, "numbers_per_pixel": self.numbers_per_pixel} | self.distortion


def baselines(
    runner: Runner,
    others: Sequence[tuple[str, Runner]],
    sources: Sequence[Source],
    data: str | None,
    evaluation: Report,
    lpips: LPIPS | None,
    *,
    quiet: bool,
) -> Section:
    """`others` are models by name; `data` is what PCA is fitted to, by default the halves of the images.

    Raises `UserError` if `data` holds no images that can be read.
    """
    codec = runner.codec
    names = [name for name in _COLUMNS if name in evaluation.summary]
    methods = [_this_model(runner, sources, names, evaluation, lpips, quiet=quiet)]
    reason = why_no_pca(codec, sources, data)
    if reason is None:
        how, pairs = _pca_pairs(codec, sources, data, quiet)
        methods.append(Method("PCA", how, density(codec), _distortion(pairs, lpips, runner.options.device)))
    for name, other in others:
        pairs = _coded_pairs(other, sources, quiet)
        how = f"model {other.codec.model_id[:12]}, its mode decoded"
        methods.append(Method(name, how, density(other.codec), _distortion(pairs, lpips, runner.options.device)))
    notes = [] if reason is None else [f"PCA is left out: {reason}."]
    notes += [] if others else ["Other models, such as a deterministic autoencoder, take --baseline MODEL."]
    if unequal := [m.name for m in methods if not math.isclose(m.numbers_per_pixel, density(codec))]:
        notes.append(f"Not of the same latent size, so not to be compared by distortion alone: {', '.join(unequal)}.")
    words = paragraphs(
        "All reconstruct the same images from latent numbers that nothing rounds; means over images. A model that is "
        "not above PCA of its own latent size has learned nothing that a linear transform does not have.",
        *notes,
    )
    records: dict[str, Any] = {"methods": [method.json() for method in methods], "pca_left_out": reason}
    records["protocol"] = {name: evaluation.protocol[name] for name in names}
    return Section("baselines", "Baselines at equal latent size", join(words, _table(methods, names)), [], records)


def _this_model(
    runner: Runner,
    sources: Sequence[Source],
    names: Sequence[str],
    evaluation: Report,
    lpips: LPIPS | None,
    *,
    quiet: bool,
) -> Method:
    """What `evaluate` found, unless it went through files, which round."""
    codec = runner.codec
    if is_gaussian(codec):
        found = {name: evaluation.summary[name] for name in names}
        return Method("this model", "the mode as `evaluate` stores it, decoded", density(codec), found)
    found = _distortion(_coded_pairs(runner, sources, quiet), lpips, runner.options.device)
    return Method("this model", "its latents, decoded", density(codec), found)


def density(codec: Codec) -> float:
    """Latent numbers for each pixel."""
    return codec.config.latent_channels / codec.factor**2


def why_no_pca(codec: Codec, sources: Sequence[Source], data: str | None) -> str | None:
    """Why there is no PCA of the model's latent size, if there is none."""
    if not is_continuous(codec):
        return "the model's latents are codes, and PCA's components are numbers"
    values = codec.config.image_channels * codec.factor**2
    if values > pca.LARGEST:
        return f"a patch of {codec.factor}x{codec.factor} pixels has {values} values, more than {pca.LARGEST}"
    if codec.config.latent_channels >= values:
        return f"{codec.config.latent_channels} numbers for each patch of {values} values lose nothing"
    if data is None and len(sources) < 2:
        return "one image cannot be parted into one half to fit to and one to measure; give --baseline-data"
    return None


def _pca_pairs(codec: Codec, sources: Sequence[Source], data: str | None, quiet: bool) -> tuple[str, Pairs]:
    """In words what PCA was fitted to, and what it makes of the images."""
    patch, components, channels = codec.factor, codec.config.latent_channels, codec.config.image_channels
    words = f"{components} components of {patch}x{patch} patches, closed form, fitted to "

    def fit(images: Sequence[Source]) -> Reconstruct:
        model = pca.fit((in_channels(x, channels) for x in _pixels(images, "PCA", quiet)), patch, components)
        return lambda x: in_rgb(model.reconstruct(in_channels(x, channels)))

    if data is not None:
        fitted = find_images(data)
        where = Path(data).name or data
        return f"{words}{len(fitted)} images of {where}", _pairs(sources, fit(fitted), "PCA", quiet)
    halves = sources[::2], sources[1::2]
    fitted = [fit(half) for half in halves]

    def pairs() -> Pairs:
        for half, other in zip(halves, reversed(fitted), strict=True):
            yield from _pairs(half, other, "PCA", quiet)

    return f"{words}every other image and measured on the rest, then the other way round", pairs()


def _coded_pairs(runner: Runner, sources: Sequence[Source], quiet: bool) -> Pairs:
    codec = runner.codec
    for source, pixels in zip(sources, _pixels(sources, "baseline", quiet), strict=True):
        labels = codec.class_numbers([source.label])
        z = runner.encode([pad(pixels, codec.factor)], labels).mode()
        yield pixels, runner.decode_uint8([z[0]], labels)[0, :, : pixels.shape[1], : pixels.shape[2]]


def _pixels(sources: Sequence[Source], what: str, quiet: bool) -> Iterator[torch.Tensor]:
    for source in tqdm(sources, what, unit="image", disable=quiet or None):
        yield source.read().pixels


def _pairs(sources: Sequence[Source], reconstruct: Reconstruct, what: str, quiet: bool) -> Pairs:
    for pixels in _pixels(sources, what, quiet):
        yield pixels, reconstruct(pixels)


def _distortion(pairs: Pairs, lpips: LPIPS | None, device: str) -> dict[str, float | None]:
    found = [compare(x[None], y[None], lpips, device) for x, y in pairs]
    return {name: mean_defined([values[name] for values in found]) for name in found[0]}


def _table(methods: Sequence[Method], names: Sequence[str]) -> Html:
    head = ("", "numbers per pixel", *(_COLUMNS[name] for name in names), "how")
    rows: list[tuple[object, ...]] = [
        (name_of(m.name), written(m.numbers_per_pixel), *(written(m.distortion[name]) for name in names), m.how)
        for m in methods
    ]
    return table(head, rows)
