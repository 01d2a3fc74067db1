"""What people look at: reconstructions, samples of the prior, interpolations and traversals."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from latent_codec.evaluation.report.html import Html, Picture, join, name_of, paragraph, paragraphs, strip
from latent_codec.evaluation.report.page import (
    NOT_CONTINUOUS,
    NOT_GAUSSIAN,
    Section,
    finite,
    is_continuous,
    is_gaussian,
    left_out,
    written,
)
from latent_codec.evaluation.report.survey import Survey, image_key
from latent_codec.images.geometry import pad
from latent_codec.images.sources import Source
from latent_codec.inference.runner import Runner
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from latent_codec.noise import fold, normal

SIDE = 256
"""Pixels; of larger images the middle is shown, and measured where the report says so."""

_SMALL_SIDE = 128  # of the many pictures of interpolations, traversals and samples
_GAIN = 4  # of differences
_PRIOR, _AGGREGATE = range(1, 3)  # what a seed is folded with
_SAMPLES = 8
_STEPS = 7
_CHANNELS = 5
_REACH = 3.0  # standard deviations either way


class Shown(NamedTuple):
    """An image's middle."""

    name: str
    pixels: torch.Tensor  # (3, h, w) uint8, sides up to `SIDE` or the model's factor, whichever is larger
    label: str | None
    """Its class, by its folder; of use to conditional models only."""


def middle(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The centre of (..., h, w), no larger than (height, width). A view."""
    top, left = max(pixels.shape[-2] - height, 0) // 2, max(pixels.shape[-1] - width, 0) // 2
    return pixels[..., top : top + height, left : left + width]


def shown_side(codec: Codec) -> int:
    """Pixels that the sides of what is shown have at most: `SIDE`, in whole latent elements."""
    return _side(codec, SIDE)


def _side(codec: Codec, side: int) -> int:
    return max(side // codec.factor, 1) * codec.factor


def shown(codec: Codec, sources: Sequence[Source], count: int) -> list[Shown]:
    """Up to `count` images spread evenly over the set, so that folders of classes come in turn.

    Raises `UserError` for an image that cannot be read.
    """
    side, count = shown_side(codec), min(count, len(sources))
    chosen = (sources[i * len(sources) // count] for i in range(count))
    return [Shown(s.name, middle(s.read().pixels, side, side).clone(), s.label) for s in chosen]


def reconstructions(runner: Runner, images: Sequence[Shown], seed: int) -> Section:
    codec = runner.codec
    strips, records = [], []
    for name, pixels, label in images:
        labels = codec.class_numbers([label])
        posterior = runner.encode([pad(pixels, codec.factor)], labels)
        noise = normal(image_key(seed, name)[None], tuple(posterior.mean.shape[1:]))
        latents = torch.cat([posterior.mode(), posterior.sample(noise)])
        mode, sample = runner.decode_uint8(list(latents), labels.repeat(2))[..., : pixels.shape[1], : pixels.shape[2]]
        psnrs = [distortion.psnr(pixels[None], x[None]).item() for x in (mode, sample)]
        difference = (128 + _GAIN * (mode.int() - pixels.int())).clamp(0, 255).to(torch.uint8)
        of = f"of {name}"
        pictures = [
            Picture(pixels, "original", f"Original {of}"),
            Picture(mode, f"mode, {psnrs[0]:.2f} dB", f"Decoded mode {of}, PSNR {psnrs[0]:.2f} dB"),
            Picture(sample, f"sample, {psnrs[1]:.2f} dB", f"Decoded sample {of}, PSNR {psnrs[1]:.2f} dB"),
            Picture(difference, f"difference, times {_GAIN}", f"Mode less original {of}, times {_GAIN}, grey is none"),
        ]
        strips.append(strip(name_of(name), pictures))
        records.append({"image": name, "psnr_mode": finite(psnrs[0]), "psnr_sample": finite(psnrs[1])})
    words = paragraphs(
        f"The middle of {len(images)} images spread evenly over the set, up to {shown_side(codec)} pixels a side: the "
        "original; the posterior's mode, decoded; one draw from the posterior, decoded to the expected pixels; and "
        f"what the mode gets wrong, (mode - original) times {_GAIN} around grey. PSNR is of the part shown.",
        *([] if is_gaussian(codec) else ["This model's posterior is a point: its draw is its mode."]),
    )
    return Section("reconstructions", "Reconstructions", join(words, *strips), [], {"images": records})


def prior_samples(runner: Runner, like: Shown, seed: int) -> Section:
    """Of the size of `like`, or of its middle."""
    codec = runner.codec
    name, title = "prior_samples", "Samples of the prior"
    if not is_gaussian(codec):
        return left_out(name, title, NOT_GAUSSIAN)
    side = _side(codec, _SMALL_SIDE)
    height, width = (-(-min(side, size) // codec.factor) for size in like.pixels.shape[1:])
    shape = (codec.config.latent_channels, height, width)
    numbers = torch.arange(_SAMPLES)
    classes = codec.config.classes
    labels = codec.class_numbers([classes[i % len(classes)] if classes else None for i in range(_SAMPLES)])
    captions = [f"class {classes[i]}" for i in labels.tolist()] if classes else None
    z = normal(fold(seed, _PRIOR, numbers), shape)
    strips = [_strip("z ~ N(0, I)", runner.decode_uint8(list(z), labels), "Sample of N(0, I), decoded", captions)]
    if (statistics := codec.statistics) is None:
        words = "The model has no latent statistics, so there are no samples of its latents' own scale."
    else:
        shift, scale = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
        z = shift + scale * normal(fold(seed, _AGGREGATE, numbers), shape)
        heading = f"z ~ each channel's Gaussian over {statistics.source}"
        alt = "Sample of the channels' Gaussians, decoded"
        strips.append(_strip(heading, runner.decode_uint8(list(z), labels), alt, captions))
        words = (
            "The second row has each channel's mean and standard deviation by the model's statistics, and no more of "
            "the aggregate posterior: neither channels nor positions depend on each other."
        )
    first = f"Latents of {width}x{height}, every element drawn on its own, decoded to expected pixels (seed {seed})."
    return Section(name, title, join(paragraphs(first, words), *strips), [], {})


def interpolations(runner: Runner, images: Sequence[Shown]) -> Section:
    codec = runner.codec
    name, title = "interpolations", "Interpolations"
    if not is_continuous(codec):
        return left_out(name, title, NOT_CONTINUOUS)
    pairs = list(zip(images[::2], images[1::2], strict=False))[:2]
    if not pairs:
        return left_out(name, title, "they need two images")
    side, strips = _side(codec, _SMALL_SIDE), []
    for a, b in pairs:
        height, width = (min(side, *(image.pixels.shape[i] for image in (a, b))) for i in (1, 2))
        parts = [pad(middle(image.pixels, height, width), codec.factor) for image in (a, b)]
        labels = codec.class_numbers([a.label, b.label])
        first, last = runner.encode(parts, labels).mode()
        weights = torch.linspace(0, 1, _STEPS)[:, None, None, None]
        z = torch.lerp(first, last, weights)
        decoded = runner.decode_uint8(list(z), labels[:1].repeat(_STEPS))[..., :height, :width]
        mixed = torch.lerp(decoded[:1].float(), decoded[-1:].float(), weights).round().to(torch.uint8)
        heading = join(name_of(a.name), " to ", name_of(b.name))
        of = f"{a.name} and {b.name}"
        strips += [
            _strip(join(heading, ": latents"), decoded, f"Latents of {of} mixed"),
            _strip(join(heading, ": pixels, to compare"), mixed, f"Pixels of {of} mixed"),
        ]
    words = paragraphs(
        "Between the modes of two images along a straight line, decoded; below it the two ends' pixels mixed in the "
        "same shares. A latent line that looks like mixed pixels says that the latents are little more than pixels.",
        *(["All are decoded as of the first image's class."] if codec.config.classes else []),
    )
    return Section(name, title, join(words, *strips), [], {})


def traversals(runner: Runner, image: Shown, found: Survey) -> Section:
    codec = runner.codec
    name, title = "traversals", "Latent traversals"
    if not is_continuous(codec):
        return left_out(name, title, NOT_CONTINUOUS)
    side = _side(codec, _SMALL_SIDE)
    part = middle(image.pixels, side, side)
    labels = codec.class_numbers([image.label])
    mode = runner.encode([pad(part, codec.factor)], labels).mode()  # (1, z, h, w)
    moves = torch.linspace(-_REACH, _REACH, _STEPS)
    strips = []
    for channel in found.by_activity[:_CHANNELS]:
        z = mode.repeat(_STEPS, 1, 1, 1)
        z[:, channel] += (moves * found.std[channel])[:, None, None]
        decoded = runner.decode_uint8(list(z), labels.repeat(_STEPS))[..., : part.shape[1], : part.shape[2]]
        heading = f"channel {channel}: std {written(float(found.std[channel]))}"
        if is_gaussian(codec):
            heading += f", KL {written(float(found.kl[channel]))} nats per element"
        captions = [f"{move:+.0f} std" if move else "as it is" for move in moves.tolist()]
        strips.append(_strip(heading, decoded, f"Channel {channel} moved", captions))
    words = paragraph(
        "The mode of ",
        name_of(image.name),
        f", of which all elements of one channel are moved together by -{_REACH:g} to +{_REACH:g} of the channel's "
        f"standard deviation over all images; the {len(strips)} channels whose posterior mean varies most, the most "
        "active first.",
    )
    return Section(name, title, join(words, *strips), [], {})


def _strip(title: object, pixels: torch.Tensor, alt: str, captions: Sequence[str] | None = None) -> Html:
    """Of (n, 3, h, w) uint8; `alt` is what all have in common."""
    captions = captions or [""] * len(pixels)
    count = len(pixels)
    pictures = [
        Picture(x, c, f"{alt}, {i} of {count}") for i, (x, c) in enumerate(zip(pixels, captions, strict=True), 1)
    ]
    return strip(title, pictures)
