"""Show reconstructions, samples of the prior, interpolations and traversals."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from latent_codec.evaluation.report import page
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
_PRIOR, _AGGREGATE = range(1, 3)  # folded into the seed
_SAMPLES = 8
_STEPS = 7
_CHANNELS = 5
_REACH = 3.0  # standard deviations either way


class Shown(NamedTuple):
    """Hold the middle of an image."""

    name: str
    pixels: torch.Tensor  # (3, h, w) uint8, sides up to `SIDE` or the model's factor, whichever is larger
    label: str | None
    """Class by the image's folder, for conditional models."""


def middle(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the centre of (..., h, w), no larger than (height, width), as a view."""
    top, left = max(pixels.shape[-2] - height, 0) // 2, max(pixels.shape[-1] - width, 0) // 2
    return pixels[..., top : top + height, left : left + width]


def shown_side(codec: Codec, side: int = SIDE) -> int:
    """Return the largest side of what is shown in pixels: `side` in whole latent elements."""
    return max(side // codec.factor, 1) * codec.factor


def select_images(codec: Codec, sources: Sequence[Source], count: int) -> list[Shown]:
    """Return up to `count` images spread evenly over the set; raises `UserError` for one that cannot be read."""
    side, count = shown_side(codec), min(count, len(sources))
    chosen = (sources[i * len(sources) // count] for i in range(count))
    return [Shown(s.name, middle(s.read().pixels, side, side).clone(), s.label) for s in chosen]


def reconstructions(runner: Runner, images: Sequence[Shown], seed: int) -> page.Section:
    """Show each image beside its decoded mode, a decoded draw and the error of the mode."""
    codec, strips, records = runner.codec, [], []
    for name, pixels, label in images:
        labels = codec.class_numbers([label])
        posterior = runner.encode([pad(pixels, codec.factor)], labels)
        noise = normal(image_key(seed, name)[None], tuple(posterior.mean.shape[1:]))
        latents = torch.cat([posterior.mode(), posterior.sample(noise)])
        mode, sample = runner.decode_uint8(list(latents), labels.repeat(2))[..., : pixels.shape[1], : pixels.shape[2]]
        psnrs = [distortion.psnr(pixels[None], x[None]).item() for x in (mode, sample)]
        difference = (128 + _GAIN * (mode.int() - pixels.int())).clamp(0, 255).to(torch.uint8)
        decoded = [
            page.picture(x, f"Decoded {kind} of {name}, PSNR {psnr:.2f} dB", f"{kind}, {psnr:.2f} dB")
            for kind, x, psnr in zip(("mode", "sample"), (mode, sample), psnrs, strict=True)
        ]
        alt = f"Mode less original of {name}, times {_GAIN}, grey is none"
        error = page.picture(difference, alt, f"difference, times {_GAIN}")
        strips.append((name, [page.picture(pixels, f"Original of {name}", "original"), *decoded, error]))
        records.append({"image": name, "psnr_mode": page.finite(psnrs[0]), "psnr_sample": page.finite(psnrs[1])})
    view = {"strips": strips, "side": shown_side(codec), "gain": _GAIN, "gaussian": page.is_gaussian(codec)}
    return page.Section("reconstructions", "Reconstructions", view, records={"images": records})


def prior_samples(runner: Runner, like: Shown, seed: int) -> page.Section:
    """Show decoded samples of N(0, I) and of each channel's Gaussian, of the size of `like` or of its middle."""
    name, title, codec = "prior_samples", "Samples of the prior", runner.codec
    if not page.is_gaussian(codec):
        return page.left_out(name, title, page.NOT_GAUSSIAN)
    side = shown_side(codec, _SMALL_SIDE)
    height, width = (-(-min(side, size) // codec.factor) for size in like.pixels.shape[1:])
    shape = (codec.config.latent_channels, height, width)
    numbers = torch.arange(_SAMPLES)
    classes = codec.config.classes
    labels = codec.class_numbers([classes[i % len(classes)] if classes else None for i in range(_SAMPLES)])
    captions = [f"class {classes[i]}" for i in labels.tolist()] if classes else []
    decoded = runner.decode_uint8(list(normal(fold(seed, _PRIOR, numbers), shape)), labels)
    strips = [("z ~ N(0, I)", page.pictures(decoded, "Sample of N(0, I), decoded", captions))]
    if (statistics := codec.statistics) is not None:
        shift, scale = (torch.tensor(v)[:, None, None] for v in (statistics.mean, statistics.std))
        z = shift + scale * normal(fold(seed, _AGGREGATE, numbers), shape)
        decoded = runner.decode_uint8(list(z), labels)
        heading = f"z ~ each channel's Gaussian over {statistics.source}"
        strips.append((heading, page.pictures(decoded, "Sample of the channels' Gaussians, decoded", captions)))
    return page.Section(name, title, {"strips": strips, "size": f"{width}x{height}", "seed": seed})


def interpolations(runner: Runner, images: Sequence[Shown]) -> page.Section:
    """Show latents, and pixels, along the straight line between two images."""
    name, title, codec = "interpolations", "Interpolations", runner.codec
    if not page.is_continuous(codec):
        return page.left_out(name, title, page.NOT_CONTINUOUS)
    pairs = list(zip(images[::2], images[1::2], strict=False))[:2]
    if not pairs:
        return page.left_out(name, title, "they need two images")
    side, rows = shown_side(codec, _SMALL_SIDE), []
    for a, b in pairs:
        height, width = (min(side, *(image.pixels.shape[i] for image in (a, b))) for i in (1, 2))
        parts = [pad(middle(image.pixels, height, width), codec.factor) for image in (a, b)]
        labels = codec.class_numbers([a.label, b.label])
        first, last = runner.encode(parts, labels).mode()
        weights = torch.linspace(0, 1, _STEPS)[:, None, None, None]
        z = torch.lerp(first, last, weights)
        decoded = runner.decode_uint8(list(z), labels[:1].repeat(_STEPS))[..., :height, :width]
        mixed = torch.lerp(decoded[:1].float(), decoded[-1:].float(), weights).round().to(torch.uint8)
        both = f"of {a.name} and {b.name} mixed"
        rows.append((a.name, b.name, page.pictures(decoded, f"Latents {both}"), page.pictures(mixed, f"Pixels {both}")))
    return page.Section(name, title, {"pairs": rows, "conditional": bool(codec.config.classes)})


def traversals(runner: Runner, image: Shown, found: Survey) -> page.Section:
    """Show one image with one channel moved at a time, for the most active channels."""
    name, title, codec = "traversals", "Latent traversals", runner.codec
    if not page.is_continuous(codec):
        return page.left_out(name, title, page.NOT_CONTINUOUS)
    side = shown_side(codec, _SMALL_SIDE)
    part = middle(image.pixels, side, side)
    labels = codec.class_numbers([image.label])
    mode = runner.encode([pad(part, codec.factor)], labels).mode()  # (1, z, h, w)
    moves = torch.linspace(-_REACH, _REACH, _STEPS)
    captions = [f"{move:+.0f} std" if move else "as it is" for move in moves.tolist()]
    strips = []
    for channel in found.by_activity[:_CHANNELS]:
        z = mode.repeat(_STEPS, 1, 1, 1)
        z[:, channel] += (moves * found.std[channel])[:, None, None]
        decoded = runner.decode_uint8(list(z), labels.repeat(_STEPS))[..., : part.shape[1], : part.shape[2]]
        heading = f"channel {channel}: std {page.written(float(found.std[channel]))}"
        if page.is_gaussian(codec):
            heading += f", KL {page.written(float(found.kl[channel]))} nats per element"
        strips.append((heading, page.pictures(decoded, f"Channel {channel} moved", captions)))
    return page.Section(name, title, {"strips": strips, "image": image.name, "reach": f"{_REACH:g}"})
