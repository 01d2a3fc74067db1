"""Time the entropy coding of a model beside its networks, and compare file sizes with the prior's code length."""

import contextlib
import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from latent_codec.bitstream.refinement import USUAL_ROUNDS, Refiner
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.images.geometry import Image, crop, pad
from latent_codec.images.sources import find_images
from latent_codec.inference.load import load
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.prior.error_feedback import Feedback
from latent_codec.prior.passes import Prior, decode, quantize
from latent_codec.prior.priors import Priors
from latent_codec.prior.quantizer import Quantized, Scaled, dequantize, scale, step_code
from latent_codec.prior.rans import Coder, Decoder
from tools.benchmark.record import OnImages, now

LARGEST_LOSS, LARGEST_OVERHEAD = 1.01, 64
"""A file may take so many times the ideal code length, and so many bytes more."""

PARTS = ("encode_network", "encode_coder", "decode", "decode_coder")
"""Parts of a prior that are timed; `decode` is network and coder in turn, `decode_coder` the coder told the tables."""


def priors_of(runner: Runner) -> tuple[Priors, list[Prior]]:
    """Return the model's priors, the factorised one first; raises `UserError` if it has none."""
    if (priors := runner.codec.priors) is None:
        raise UserError("the model has no prior to code with; `latent-codec export MODEL DST --data IMAGES` makes one")
    return priors, [priors.factorized, *([] if priors.context is None else [priors.context])]


def time_coding(runner: Runner, images: Sequence[Image], step: float, rounds: int) -> dict[str, Any]:
    """Return the seconds per image of each part of coding, medians over rounds of means over images.

    Reading and writing files and a first round do not count. `refine` takes `USUAL_ROUNDS` under the best prior, in one
    round; `symbols` is the mean number of an image's latents; a prior's kind has the seconds of its `PARTS`.
    """
    priors, kinds = priors_of(runner)
    codec, device = runner.codec, runner.options.device
    coders = [Coder(prior.tables) for prior in kinds]
    refiner = Refiner(StreamCodec(codec, device), runner, USUAL_ROUNDS)
    taken: dict[str, list[float]] = defaultdict(list)
    symbols = 0
    for round_ in range(rounds + 1):
        clock = _Clock(device)
        for image in images:
            with torch.inference_mode():
                with clock("encoder"):
                    mean = codec.encode(pad(image.pixels, codec.factor)[None].to(device)).mean[0].cpu()
                with clock("scale"):
                    scaled = scale(mean, priors.channel_steps, step_code(step), None)
                pairs = zip(kinds, coders, strict=True)
                quantized = [_time_prior(prior, coder, scaled, clock, priors.feedback) for prior, coder in pairs]
                with clock("dequantize"):
                    latents = dequantize(quantized[-1], priors.channel_steps)
                with clock("decoder"):
                    codec.decode_uint8(latents[None].to(device)).cpu()
            if round_ == 1:
                with clock("refine"):
                    refiner.scale(mean, crop(image.pixels, image.geometry), scaled.step, seed=None)
            symbols += scaled.latents.size if round_ == 0 else 0
        for name, seconds in clock.seconds.items() if round_ else ():
            taken[name].append(seconds / len(images))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    own = {prior.kind: {part: medians.pop(f"{prior.kind} {part}") for part in PARTS} for prior in kinds}
    return medians | {"symbols": symbols / len(images)} | own


def _time_prior(prior: Prior, coder: Coder, scaled: Scaled, clock: "_Clock", feedback: Feedback | None) -> Quantized:
    with clock(f"{prior.kind} encode_network"):
        (coding,) = quantize(prior, [scaled], clock.device, feedback)
    with clock(f"{prior.kind} encode_coder"):
        payload = coder.encode(coding.passes)
    with clock(f"{prior.kind} decode"):
        (found,) = decode(prior, coder, [payload], [scaled.settings], clock.device)
    with clock(f"{prior.kind} decode_coder"):
        decoder = Decoder(coder, payload)
        for _, tables in coding.passes:
            decoder.read(tables)
        decoder.finish()
    if isinstance(found, UserError) or not (found.fine == coding.quantized.fine).all():
        raise RuntimeError(f"the {prior.kind} prior's payload does not decode to what was coded")
    return found


class _Clock:
    """Add up seconds by name."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = now()
        yield
        self.seconds[name] += now() - started


def measure_sizes(runner: Runner, where: str, steps: Sequence[float]) -> dict[str, Any]:
    """Compare files of every step and prior with the prior's code length, and the priors' bits per pixel.

    `worst_excess`, over images the largest bytes - `LARGEST_LOSS` * ideal bits / 8, must be at most `LARGEST_OVERHEAD`.
    """
    found = rate_distortion(runner, where, RateDistortionOptions(steps=steps, anchors=()))
    sizes, bpp = [], {}
    for i, point in enumerate(found.points):
        if not point.setting.dithered:
            rows = [(image.rows[i], image.pixels) for image in found.images]
            worst = max((row.bytes or 0) - LARGEST_LOSS * (row.ideal_bpp or 0) * area / 8 for row, area in rows)
            key = {"prior": point.setting.codec, "step": point.setting.value}
            sizes.append(key | {"bpp": point.bpp, "ideal_bpp": point.ideal_bpp, "worst_excess": worst})
            bpp[point.setting.codec, point.setting.value] = point.bpp
    saves = {
        f"step {step:g}": 1 - value / bpp["factorized", step]
        for (kind, step), value in bpp.items()
        if kind == "context"
    }
    worst = max(size["worst_excess"] for size in sizes)
    return {"sizes": sizes, "context_saves": saves, "worst_excess_bytes": worst, "allowed": LARGEST_OVERHEAD}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding(OnImages):
    """Time the entropy coding of images beside the networks, and compare files with the prior's code length."""

    model: str = "photo"
    steps: tuple[float, ...] = (1.0, 1.4, 2.0)
    """Quantiser steps of files; times are taken at the first."""
    rounds: int = 5
    """Rounds, in each of which each part is timed once per image."""
    threads: int | None = None
    """Threads of the networks, by default torch's choice; the entropy coder itself has one."""

    def run(self) -> None:
        """Measure times and sizes, and report them."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        runner = load(self.model, ComputeOptions(device=self.device, batch_size=1, workers=1))
        images = [source.read() for source in find_images(self.dir)]
        seconds = time_coding(runner, images, self.steps[0], self.rounds)
        kinds = [prior.kind for prior in priors_of(runner)[1]]
        best = seconds[kinds[-1]]
        plain = seconds["encoder"] + seconds["scale"] + best["encode_network"] + best["encode_coder"]
        results = {"seconds_per_image": seconds} | {kind: _coding_ratios(seconds, kind) for kind in kinds}
        results["refine"] = {"rounds": USUAL_ROUNDS, "times_as_long_to_encode": 1 + seconds["refine"] / plain}
        results["files"] = measure_sizes(runner, self.dir, self.steps)
        about = {"model_id": runner.model_id, "images": len(images), "rounds": self.rounds}
        self.report(results, **about, step_of_times=self.steps[0], threads_of_the_coder=1)


def _coding_ratios(seconds: dict[str, Any], kind: str) -> dict[str, float]:
    """Return one prior's times relative to the encoder network, and the shares of coding in encode and decode."""
    own = seconds[kind]
    encode, decode = own["encode_network"] + own["encode_coder"], own["decode"]
    coding, uncoding = encode + seconds["scale"], decode + seconds["dequantize"]
    return {
        "encode_prior_over_encoder_network": encode / seconds["encoder"],
        "decode_prior_over_encoder_network": decode / seconds["encoder"],
        "share_of_encode": coding / (coding + seconds["encoder"]),
        "share_of_decode": uncoding / (uncoding + seconds["decoder"]),
        "coder_alone_encode_msymbols_per_second": seconds["symbols"] / own["encode_coder"] / 1e6,
        "coder_alone_decode_msymbols_per_second": seconds["symbols"] / own["decode_coder"] / 1e6,
    }
