"""Rate control: what is asked for is kept to, nothing is coarser than it must be, and what cannot be had is refused."""

import dataclasses
import functools
from bisect import bisect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from latent_codec.bitstream.rate_control import FINEST_FOR_PSNR, Rate, choose
from latent_codec.bitstream.stream_codec import CompressedImage, StreamCodec
from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry, as_shown, crop, pad
from latent_codec.metrics import distortion
from latent_codec.model.codec import Codec
from latent_codec.model.networks.linear import PatchMoments
from latent_codec.model.networks.lite import LiteBackbone
from latent_codec.prior.quantizer import LIMIT, MAX_STEP, MIN_STEP, STEP_ONE, Scaled, step_code

WIDTH, HEIGHT = 45, 30
GRID = sorted({round(STEP_ONE * 2 ** (e / 12)) for e in range(-72, 72)})
"""Stored steps all over the range, a twelfth of an octave apart."""

Choose = Callable[..., CompressedImage]


class Subject:
    """One image and the codec to code it with."""

    def __init__(self, codec: Codec, prior: Any, seed: int | None, mode: Any = "RGB") -> None:
        self.stream, self.seed = StreamCodec(codec, "cpu", prior), seed
        self.geometry = Geometry(width=WIDTH, height=HEIGHT, orientation=1, mode=mode, background=None)
        generator = torch.Generator().manual_seed(5)
        coarse = torch.rand(1, 1 if mode == "L" else 3, 5, 7, generator=generator)
        smooth = interpolate(coarse, size=(HEIGHT, WIDTH), mode="bicubic")[0]
        self.pixels = (255 * smooth.clamp(0, 1)).to(torch.uint8).expand(3, -1, -1)
        self.fit(codec)
        with torch.inference_mode():
            self.mean = codec.encode(pad(self.pixels, codec.factor)[None]).mean[0]

    def fit(self, codec: Codec) -> None:
        """Let the codec be the best linear one for this image, so that finer steps are worth having."""
        x = codec.likelihood.from_uint8(pad(self.pixels, 8))
        patches = x.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1).double()
        mean = x.mean((1, 2)).double()
        patches = patches - mean.repeat_interleave(64)
        assert isinstance(codec.backbone, LiteBackbone)
        codec.backbone.start_from_closed_form(PatchMoments(mean, patches.T @ patches / len(patches)), 0.01)
        self.stream = StreamCodec(codec, "cpu", self.stream.prior.kind)

    def choose(self, **rate: Any) -> CompressedImage:
        def scale(step: int) -> Scaled:
            return self.stream.scale(self.mean, step, self.seed)

        return choose(self.stream, scale, self.geometry, self.pixels, Rate(**rate), None)

    @functools.cache  # noqa: B019 (one for each test)
    def size(self, step: int) -> int:
        scaled = self.stream.scale(self.mean, step, self.seed)
        return len(self.stream.compress([(scaled, self.geometry)])[0].data)

    @functools.cache  # noqa: B019
    def psnr(self, step: int) -> float:
        z = self.stream.dequantize(self.stream.quantize(self.stream.scale(self.mean, step, self.seed)))
        with torch.inference_mode():
            decoded = crop(self.stream.codec.decode_uint8(z[None]), self.geometry)[0]
        return distortion.psnr(as_shown(decoded, self.geometry)[None], self.pixels[None]).item()


@pytest.fixture(
    params=[("factorized", None), ("context", None), ("context", 77)], ids=["factorized", "context", "draw"]
)
def subject(request: pytest.FixtureRequest, codec: Codec) -> Subject:
    return Subject(codec, *request.param)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step": 1.0, "bpp": 2.0}, "--step 1 and --bpp 2 each decide"),
        ({"bpp": 1.0, "psnr": 30.0}, "--bpp 1 and --psnr 30 each decide"),
        ({"step": 1.0, "bpp": 2.0, "psnr": 3.0}, "give one of them"),
        ({"step": 0.0}, "outside 0.015625 to 63.999"),
        ({"step": 100.0}, "outside"),
        ({"step": float("nan")}, "outside"),
        ({"bpp": 0.0}, "--bpp 0 must be a positive number"),
        ({"bpp": float("nan")}, "--bpp nan must be a positive number"),
        ({"psnr": -3.0}, "--psnr -3 must be a positive number of dB"),
        ({"psnr": float("inf")}, "--psnr inf must be"),
        ({"max_bytes": 0}, "--max-bytes 0 leaves no room"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Rate(**options)


def test_a_step_alone_is_taken_as_it_is(subject: Subject) -> None:
    assert Rate().fixed_step == STEP_ONE and Rate(step=0.5).fixed_step == STEP_ONE // 2
    assert Rate(step=0.5, max_bytes=10).fixed_step is None
    assert subject.choose().quantized.step == STEP_ONE
    for step in (MIN_STEP, 0.3, 7.0, MAX_STEP):
        assert subject.choose(step=step).quantized.step == step_code(step)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("by", ["bpp", "max_bytes"])
def test_the_size_is_kept_to_and_used_up(subject: Subject, share: float, by: str) -> None:
    smallest, largest = subject.size(GRID[-1]), subject.size(GRID[0])
    limit = round(smallest + share * (largest - smallest))
    rate = {"max_bytes": limit, "step": MIN_STEP} if by == "max_bytes" else {"bpp": 8 * limit / (WIDTH * HEIGHT) + 1e-9}
    coded = subject.choose(**rate)
    assert len(coded.data) == subject.size(coded.quantized.step) <= limit
    step = coded.quantized.step
    finer = [*range(step - max(2, step // 400), step), *GRID[bisect(GRID, step) :]]
    assert any(subject.size(s) > limit for s in finer)  # among the last, where size was not monotone


@pytest.mark.parametrize("target", [13.0, 16.0, 18.0])
def test_the_quality_is_reached_at_no_finer_a_step_than_needed(subject: Subject, target: float) -> None:
    coded = subject.choose(psnr=target)
    assert subject.psnr(coded.quantized.step) >= target
    good = [step for step in GRID if subject.psnr(step) >= target]
    assert good
    coarsest = max(step for i, step in enumerate(GRID) if GRID[: i + 1] == good[: i + 1])
    assert coded.quantized.step >= coarsest * (1 - 1 / 500) - 1


def test_the_quality_of_grey_is_that_of_the_grey_image(codec: Codec) -> None:
    subject = Subject(codec, "factorized", None, "L")
    codec.state_dict()["backbone.linear.decoder.bias"] += torch.tensor(
        [0.1, -0.1, 0.0]
    )  # its planes are no longer equal
    coded = subject.choose(psnr=24.0)
    assert subject.psnr(coded.quantized.step) >= 24
    subject.geometry = dataclasses.replace(subject.geometry, mode="RGB")
    assert subject.choose(psnr=24.0).quantized.step < coded.quantized.step


def test_a_quality_out_of_reach_is_refused_with_the_best(subject: Subject) -> None:
    with pytest.raises(UserError, match=rf"to 90 dB; .* {subject.psnr(step_code(FINEST_FOR_PSNR)):.2f} dB"):
        subject.choose(psnr=90.0)


def test_a_size_out_of_reach_is_refused_with_the_smallest_which_is_then_to_be_had(subject: Subject) -> None:
    smallest = subject.size(step_code(MAX_STEP))
    for rate in ({"max_bytes": 1}, {"max_bytes": smallest - 1}, {"bpp": 1e-9}, {"bpp": 0.01}):
        with pytest.raises(UserError, match=f"the smallest has {smallest} bytes"):
            subject.choose(**rate)
    assert len(subject.choose(max_bytes=smallest).data) <= smallest


def test_the_limit_of_bytes_comes_first(subject: Subject) -> None:
    limit = (subject.size(GRID[-1]) + subject.size(STEP_ONE)) // 2
    for rate in ({}, {"step": 0.1}, {"psnr": 18.0}, {"bpp": 20.0}):
        assert len(subject.choose(max_bytes=limit, **rate).data) <= limit
    for rate in ({}, {"step": 3.0}, {"psnr": 14.0}, {"bpp": 8 * limit / (WIDTH * HEIGHT)}):
        assert subject.choose(max_bytes=10**6, **rate).data == subject.choose(**rate).data


def test_steps_too_fine_for_a_stream_are_passed_over(subject: Subject) -> None:
    subject.mean = subject.mean * 1000
    finest = int(
        subject.mean.abs().div(torch.from_numpy(subject.stream.channel_steps)[:, None, None]).max() / LIMIT * STEP_ONE
    )
    assert finest > step_code(MIN_STEP)
    step = subject.choose(bpp=1e6).quantized.step
    assert finest <= step <= finest * (1 + 1 / 256) + 2
    with pytest.raises(UserError, match="larger --step"):
        subject.stream.scale(subject.mean, round(finest * 0.99), subject.seed)


@pytest.mark.parametrize("rate", [{}, {"bpp": 5.0}, {"psnr": 16.0}, {"max_bytes": 1000}])
def test_latents_that_are_not_finite_are_refused(subject: Subject, rate: dict[str, Any]) -> None:
    subject.mean = subject.mean.clone()
    subject.mean[0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="nan steps large"):
        subject.choose(**rate)


def test_the_choice_is_found_in_few_trials(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a pass through the context networks."""
    quantize, trials = subject.stream.quantize, []
    monkeypatch.setattr(subject.stream, "quantize", lambda *args: trials.append(args) or quantize(*args))
    for rate in ({"bpp": 0.5}, {"bpp": 0.7}, {"bpp": 1.0}, {"psnr": 14.0}, {"psnr": 18.0}, {"max_bytes": 100}):
        trials.clear()
        subject.choose(**rate)
        assert len(trials) <= 24
