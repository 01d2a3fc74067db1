"""Rate control keeps to what is asked for, codes nothing coarser than it must, and refuses what is impossible."""

import copy
import dataclasses
import math
from bisect import bisect
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.bitstream.rate_control import CLOSE_PSNR, FINEST_FOR_PSNR, Rate, step_of_quality
from latent_codec.model.codec import Codec
from latent_codec.prior.quantizer import LIMIT, MAX_STEP, MIN_STEP, STEP_ONE, step_code
from tests.support.errors import refused
from tests.support.subject import HEIGHT, WIDTH, Subject

GRID = sorted({round(STEP_ONE * 2 ** (e / 12)) for e in range(-72, 72)})
"""Stored steps over the whole range, a twelfth of an octave apart."""


@pytest.fixture(scope="module", params=[("factorized", None), ("context", None), ("context", 77)], ids=str)
def subject(request: pytest.FixtureRequest, model_file: Path) -> Subject:
    return Subject(Codec.load(model_file), *request.param)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step": 1.0, "bpp": 2.0}, "--step 1 and --bpp 2 each decide"),
        ({"step": 1.0, "bpp": 2.0, "psnr": 3.0}, "give one of them"),
        *(({"step": n}, "outside 0.015625 to 63.999") for n in (0.0, math.nan)),
        *(({"bpp": n}, f"--bpp {n:g} must be a positive number") for n in (0.0, math.nan)),
        *(({"psnr": n}, f"--psnr {n:g} must be a positive number of dB") for n in (-3.0, math.inf)),
        ({"max_bytes": 0}, "--max-bytes 0 leaves no room"),
    ],
)
def test_a_rate_that_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    refused(reason, Rate, **options)


def test_quality_is_another_scale_of_the_step() -> None:
    steps = [step_of_quality(q) for q in (1, 50, 75, 100)]
    assert steps == pytest.approx([15.14, 1, 0.25, 1 / 16], rel=1e-3) and step_code(steps[-1]) == STEP_ONE // 16
    for quality in (0, 101):
        refused(f"--quality {quality} is outside 1 to 100", step_of_quality, quality)


def test_a_step_alone_is_taken_as_it_is(subject: Subject) -> None:
    assert Rate().fixed_step == STEP_ONE and Rate(step=0.5).fixed_step == STEP_ONE // 2
    assert Rate(step=0.5, max_bytes=10).fixed_step is None and subject.compress().quantized.step == STEP_ONE
    for step in (MIN_STEP, 0.3, MAX_STEP):
        assert subject.compress(step=step).quantized.step == step_code(step)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_file_fits_the_size_and_a_finer_one_does_not(subject: Subject, share: float) -> None:
    smallest, largest = subject.size(GRID[-1]), subject.size(GRID[0])
    limit = round(smallest + share * (largest - smallest))
    for rate in ({"max_bytes": limit, "step": MIN_STEP}, {"bpp": 8 * limit / (WIDTH * HEIGHT) + 1e-9}):
        coded = subject.compress(**rate)
        assert len(coded.data) == subject.size(coded.quantized.step) <= limit
        step = coded.quantized.step
        finer = [*range(step - max(2, step // 400), step), *GRID[bisect(GRID, step) :]]
        assert any(subject.size(s) > limit for s in finer)  # among the last, where size was not monotone


@pytest.mark.parametrize("target", [13.0, 18.0])
def test_the_quality_is_reached_at_no_finer_a_step_than_needed(subject: Subject, target: float) -> None:
    step = subject.compress(psnr=target).quantized.step
    assert subject.psnr(step) >= target
    coarser = bisect(GRID, (step + 1) / (1 - 1 / 500))
    # The quality does not hold all the way to the next coarser step of the grid, or only just.
    assert any(subject.psnr(s) < target + CLOSE_PSNR for s in reversed(GRID[: coarser + 1]))


def test_the_quality_of_grey_is_that_of_the_grey_image(codec: Codec) -> None:
    subject = Subject(codec, "factorized", None, "L")
    bias = torch.tensor([0.1, -0.1, 0.0])
    codec.state_dict()["backbone.linear.decoder.bias"] += bias  # its planes are no longer equal
    coded = subject.compress(psnr=24.0)
    assert subject.psnr(coded.quantized.step) >= 24
    subject.geometry = dataclasses.replace(subject.geometry, mode="RGB")
    assert subject.compress(psnr=24.0).quantized.step < coded.quantized.step


def test_what_is_out_of_reach_is_refused_with_the_best_that_is_possible(subject: Subject) -> None:
    refused(rf"to 90 dB; .* {subject.psnr(step_code(FINEST_FOR_PSNR)):.2f} dB", subject.compress, psnr=90.0)
    smallest = subject.size(step_code(MAX_STEP))
    for rate in ({"max_bytes": smallest - 1}, {"bpp": 1e-9}):
        refused(f"the smallest has {smallest} bytes", subject.compress, **rate)
    assert len(subject.compress(max_bytes=smallest).data) <= smallest


@pytest.mark.slow
def test_the_limit_of_bytes_takes_precedence(subject: Subject) -> None:
    limit = (subject.size(GRID[-1]) + subject.size(STEP_ONE)) // 2
    for rate in ({"step": 0.1}, {"psnr": 18.0}, {"bpp": 20.0}):
        assert len(subject.compress(max_bytes=limit, **rate).data) <= limit
    for rate in ({"step": 3.0}, {"psnr": 14.0}, {"bpp": 8 * limit / (WIDTH * HEIGHT)}):
        assert subject.compress(max_bytes=10**6, **rate).data == subject.compress(**rate).data


def test_steps_too_fine_for_a_stream_are_passed_over(subject: Subject) -> None:
    large = copy.copy(subject)
    large.mean = subject.mean * 1000
    in_steps = large.mean.abs() / torch.from_numpy(subject.stream.channel_steps)[:, None, None]
    finest = int(in_steps.max() / LIMIT * STEP_ONE)
    assert finest > step_code(MIN_STEP)
    assert finest <= large.compress(bpp=1e6).quantized.step <= finest * (1 + 1 / 256) + 2
    refused("larger --step", large.scale, round(finest * 0.99))


@pytest.mark.slow
def test_the_step_is_found_in_few_trials(subject: Subject) -> None:
    """Each costs a pass through the context networks."""
    trials: list[int] = []
    for rate in ({"bpp": 0.5}, {"bpp": 1.0}, {"psnr": 14.0}, {"psnr": 18.0}, {"max_bytes": 100}):
        trials.clear()
        subject.compress(lambda step: trials.append(step) or subject.scale(step), **rate)
        assert len(trials) <= 24
