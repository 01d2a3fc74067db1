"""What the entropy coding of a model costs: seconds beside its networks, bytes beside the prior's code length."""

import contextlib
import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from latent_codec.bitstream.refinement import USUAL_ROUNDS, Refiner
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.errors import UserError
from latent_codec.images.geometry import Image, crop, pad
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.prior.error_feedback import Feedback
from latent_codec.prior.passes import PassValues, PayloadSettings, Prior, decode, encode, quantize
from latent_codec.prior.priors import Priors
from latent_codec.prior.quantizer import Quantized, Scaled, dequantize, scale, step_code
from latent_codec.prior.rans import Coder
from tools.benchmark.record import machine, report

LARGEST_LOSS = 1.01
"""A file may take this times the ideal code length and `LARGEST_OVERHEAD` bytes."""

LARGEST_OVERHEAD = 64


def priors_of(codec: Codec) -> tuple[Priors, list[Prior]]:
    """All that the model has, the factorised one first; raises `UserError` if it has none."""
    if codec.priors is None:
        raise UserError("the model has no prior to code with; `latent-codec export MODEL DST --data IMAGES` makes one")
    context = codec.priors.context
    return codec.priors, [codec.priors.factorized, *([] if context is None else [context])]


class PriorSeconds(NamedTuple):
    """Per image."""

    encode_network: float
    """Which tables, and what is left to code under them."""
    encode_coder: float
    decode: float
    """Network and coder, which take turns."""
    decode_coder: float
    """The coder alone, told the tables beforehand."""


class Seconds(NamedTuple):
    """Per image, medians over rounds of means over images; reading and writing files is not in them."""

    encoder: float
    scale: float
    dequantize: float
    decoder: float
    priors: dict[str, PriorSeconds]
    symbols: float
    """Mean number of an image's latents."""
    refine: float
    """`USUAL_ROUNDS` of it under the best prior, of one round's images alone."""


def time_coding(codec: Codec, images: Sequence[Image], step: float, rounds: int, device: str) -> Seconds:
    """All parts of coding one image, then the next, so that noise hits all alike; the first round is not counted."""
    priors, kinds = priors_of(codec)
    coders = [Coder(prior.tables) for prior in kinds]
    compute = ComputeOptions(device=device, batch_size=1, workers=1)
    refiner = Refiner(StreamCodec(codec, device), Runner(codec, compute), USUAL_ROUNDS)
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
                found = [
                    _time_prior(p, coder, scaled, clock, device, priors.feedback)
                    for p, coder in zip(kinds, coders, strict=True)
                ]
                with clock("dequantize"):
                    latents = dequantize(found[-1], priors.channel_steps)
                with clock("decoder"):
                    codec.decode_uint8(latents[None].to(device)).cpu()
            if round_ == 1:
                with clock("refine"):
                    refiner.scale(mean, crop(image.pixels, image.geometry), scaled.step, seed=None)
            symbols += scaled.latents.size if round_ == 0 else 0
        if round_:
            for name, seconds in clock.seconds.items():
                taken[name].append(seconds / len(images))
    median = {name: statistics.median(values) for name, values in taken.items()}
    return Seconds(
        encoder=median["encoder"],
        scale=median["scale"],
        dequantize=median["dequantize"],
        decoder=median["decoder"],
        priors={p.kind: PriorSeconds(**{f: median[f"{p.kind} {f}"] for f in PriorSeconds._fields}) for p in kinds},
        symbols=symbols / len(images),
        refine=median["refine"],
    )


def _time_prior(
    prior: Prior, coder: Coder, scaled: Scaled, clock: "_Clock", device: str, feedback: Feedback | None
) -> Quantized:
    with clock(f"{prior.kind} encode_network"):
        (coding,) = quantize(prior, [scaled], device, feedback)
    with clock(f"{prior.kind} encode_coder"):
        payload = encode(coder, coding.passes)
    z, h, w = scaled.latents.shape
    settings = PayloadSettings((z, h, w), scaled.step, scaled.seed)
    with clock(f"{prior.kind} decode"):
        (found,) = decode(prior, coder, [payload], [settings], device)
    with clock(f"{prior.kind} decode_coder"):
        _read(coder, payload, coding.passes)
    if isinstance(found, UserError) or not (found.fine == coding.quantized.fine).all():
        raise RuntimeError(f"the {prior.kind} prior's payload does not decode to what was coded")
    return found


def _read(coder: Coder, payload: bytes, passes: Sequence[PassValues]) -> None:
    decoder = coder.decoder(payload)
    for _, tables in passes:
        decoder.read(tables)
    decoder.finish()


class _Clock:
    """Seconds by name."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._cuda = device.startswith("cuda")

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self._now()
        yield
        self.seconds[name] += self._now() - started

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Sizes(NamedTuple):
    """One step's files under one prior."""

    prior: str
    step: float
    bpp: float
    """Mean over images of the whole file's bits per pixel."""
    ideal_bpp: float
    """The prior's code length, likewise."""
    worst_excess: float
    """Largest, over images, of bytes - `LARGEST_LOSS` * ideal bits / 8: must not exceed `LARGEST_OVERHEAD`."""


@torch.inference_mode()
def measure_sizes(codec: Codec, images: Sequence[Image], steps: Sequence[float], device: str) -> list[Sizes]:
    """Whole files against the prior's code length, for every step and prior."""
    _, kinds = priors_of(codec)
    coders = [StreamCodec(codec, device, prior.kind) for prior in kinds]
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = defaultdict(list)
    for image in images:
        mean = codec.encode(pad(image.pixels, codec.factor)[None].to(device)).mean[0]
        area = image.geometry.width * image.geometry.height
        for step in steps:
            for coder in coders:
                scaled = coder.scale(mean, step_code(step), None)
                (coded,) = coder.compress([(scaled, image.geometry)])
                excess = len(coded.data) - LARGEST_LOSS * coded.ideal_bits / 8
                row = (8 * len(coded.data) / area, coded.ideal_bits / area, excess)
                found[coder.prior.kind, step].append(row)
    sizes = []
    for (kind, step), rows in found.items():
        bpp, ideal_bpp, excess = zip(*rows, strict=True)
        sizes.append(Sizes(kind, step, statistics.mean(bpp), statistics.mean(ideal_bpp), max(excess)))
    return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding:
    """Time the entropy coding of images beside the networks, and hold files against the prior's code length."""

    dir: tyro.conf.Positional[str]
    model: str = "photo"
    steps: tuple[float, ...] = (1.0, 1.4, 2.0)
    """Of files; times are taken at the first."""
    rounds: int = 5
    """Each part is timed once per round and image, in turn."""
    threads: int | None = None
    """Of the networks; the entropy coder itself has one. By default torch's choice."""
    device: str = "cpu"
    out: Path | None = None
    """JSON file for the results."""

    def run(self) -> None:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        codec = Codec.load(self.model, self.device).to(memory_format=torch.channels_last)
        images = [source.read() for source in find_images(self.dir)]
        seconds = time_coding(codec, images, self.steps[0], self.rounds, self.device)
        sizes = measure_sizes(codec, images, self.steps, self.device)
        results = {"seconds_per_image": seconds._asdict() | {k: v._asdict() for k, v in seconds.priors.items()}}
        del results["seconds_per_image"]["priors"]
        results |= {kind: _coding_ratios(seconds, kind) for kind in seconds.priors}
        plain = seconds.encoder + seconds.scale + sum(list(seconds.priors.values())[-1][:2])
        results["refine"] = {"rounds": USUAL_ROUNDS, "times_as_long_to_encode": 1 + seconds.refine / plain}
        results["files"] = {"sizes": [s._asdict() for s in sizes], "context_saves": _savings(sizes)}
        results["files"] |= {"worst_excess_bytes": max(s.worst_excess for s in sizes), "allowed": LARGEST_OVERHEAD}
        about = {"model_id": codec.model_id, "set": Path(self.dir).name, "images": len(images), "rounds": self.rounds}
        about |= {"step_of_times": self.steps[0], "threads_of_the_coder": 1}
        report(results, about | machine(self.device), self.out)


def _coding_ratios(seconds: Seconds, kind: str) -> dict[str, float]:
    """One prior's times as ratios: to the encoder network, and as shares of coding in all of encode and decode."""
    own = seconds.priors[kind]
    encode, decode = own.encode_network + own.encode_coder, own.decode
    coding, uncoding = encode + seconds.scale, decode + seconds.dequantize
    return {
        "encode_prior_over_encoder_network": encode / seconds.encoder,
        "decode_prior_over_encoder_network": decode / seconds.encoder,
        "share_of_encode": coding / (coding + seconds.encoder),
        "share_of_decode": uncoding / (uncoding + seconds.decoder),
        "coder_alone_encode_msymbols_per_second": seconds.symbols / own.encode_coder / 1e6,
        "coder_alone_decode_msymbols_per_second": seconds.symbols / own.decode_coder / 1e6,
    }


def _savings(sizes: list[Sizes]) -> dict[str, float]:
    """By step, the share of the factorised prior's mean bits per pixel that the context prior saves."""
    bpp = {(s.prior, s.step): s.bpp for s in sizes}
    steps = [s.step for s in sizes if s.prior == "context"]
    return {f"step {step:g}": 1 - bpp["context", step] / bpp["factorized", step] for step in steps}
