"""Refinement lowers the cost of files, sees the whole image through tiles, and refuses what cannot be refined."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latent_codec.bitstream.refinement import LEARNING_RATE, Refiner, cost_slope
from latent_codec.evaluation.rate_distortion.measure import RateDistortionOptions, rate_distortion
from latent_codec.images.geometry import crop, pad
from latent_codec.inference import tiling
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.prior.passes import ideal_bits, neighbour_bits
from latent_codec.prior.quantizer import STEP_ONE, Scaled
from tests.conftest import Draw, files_of
from tests.support.errors import rejected
from tests.support.folder import CPU, make
from tests.support.networks import seeded
from tests.support.subject import Subject


@pytest.fixture(scope="module", params=["factorized", "context"])
def subject(request: pytest.FixtureRequest, model_file: Path) -> Subject:
    return Subject(Codec.load(model_file), request.param, None)


def refined(subject: Subject, rounds: int, step: int = STEP_ONE, rate: float = LEARNING_RATE) -> Scaled:
    refiner = Refiner(subject.stream, Runner(subject.stream.codec, CPU), rounds, learning_rate=rate)
    return refiner.scale(subject.mean, subject.pixels, step, seed=subject.seed)


def cost(subject: Subject, scaled: Scaled) -> float:
    """Return NLL / step^2 and the code length in nats, each from its definition."""
    codec, coding = subject.stream.codec, subject.stream.code(scaled)
    with torch.inference_mode():
        params = crop(codec.likelihood_params(subject.stream.dequantize(coding.quantized)[None]), subject.geometry)
        nll = -codec.likelihood.log_prob(params, codec.likelihood.from_uint8(subject.pixels[None])).item()
    return nll * (STEP_ONE / scaled.step) ** 2 + math.log(2) * ideal_bits(subject.stream.prior, coding.passes)


@pytest.mark.slow
@pytest.mark.parametrize("step", [STEP_ONE // 4, STEP_ONE, 3 * STEP_ONE])
def test_rounds_lower_the_cost_and_none_changes_nothing(subject: Subject, step: int) -> None:
    plain = subject.scale(step)
    np.testing.assert_array_equal(refined(subject, 0, step).latents, plain.latents)
    found = [refined(subject, rounds, step) for rounds in (1, 4, 16)]
    assert all((one.step, one.seed) == (step, None) for one in found)
    costs = [cost(subject, one) for one in (plain, *found)]
    assert costs == sorted(costs, reverse=True)  # the best of the rounds: more of them are never worse
    assert costs[-1] < costs[0] - 5 or step > STEP_ONE  # nats; where all is 0, little can move
    np.testing.assert_array_equal(refined(subject, 16, step).latents, found[-1].latents)


def test_harmful_moves_and_infinite_gradients_change_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, real = subject.scale(STEP_ONE).latents, Runner.nll_gradient
    np.testing.assert_array_equal(refined(subject, 3, rate=-1.0).latents, plain)
    monkeypatch.setattr(Runner, "nll_gradient", lambda *args: (1.0, real(*args)[1] / 0))
    np.testing.assert_array_equal(refined(subject, 3).latents, plain)


def test_a_draw_is_not_refined(codec: Codec) -> None:
    drawn = Subject(codec, None, seed=3)
    assert refined(drawn, 0).seed == 3
    rejected("no draw from the posterior", refined, drawn, 1)


def test_neighbours_cost_what_their_tables_say(subject: Subject) -> None:
    scaled, prior = subject.scale(STEP_ONE), subject.stream.prior
    coding = subject.stream.code(scaled)
    own, lower, higher = neighbour_bits(prior, coding)
    for array, change in ((own, 0), (lower, -1), (higher, 1)):
        total = sum(prior.tables.bits(values + change, tables).sum() for values, tables in coding.passes)
        assert array.sum() == pytest.approx(total)
    # Each at its place: moving one value by a whole step codes its neighbour there, in the pass that holds it.
    place = (1, 2, 3)
    moved = scaled.latents.copy()
    moved[place] = coding.quantized.fine[place] / 2**17 + 1
    other = subject.stream.code(scaled._replace(latents=moved))
    pairs = zip(coding.passes, other.passes, strict=True)
    (values, tables), (others, _) = next((a, b) for a, b in pairs if (a[0] != b[0]).any())
    (i,) = np.flatnonzero(values != others)
    assert others[i] == values[i] + 1 and higher[place] == prior.tables.bits(others[[i]], tables[[i]])
    assert own[place] == prior.tables.bits(values[[i]], tables[[i]])


def test_the_rates_kink_is_overcome_or_nothing_moves() -> None:
    slope = np.array([-3.0, -1.0, 0.0, 1.0, 3.0, 3.0, -3.0])
    lower = np.array([2.0, 2.0, 2.0, 2.0, 2.0, -1.0, -1.0])
    found = cost_slope(slope, lower, np.full(7, 2.0))
    np.testing.assert_array_equal(found, [-1.0, 0.0, 0.0, 0.0, 1.0, 4.5, -1.5])


def image_and_latents(codec: Codec, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (3, height, width), generator=seeded(0), dtype=torch.uint8)
    with torch.inference_mode():
        return pixels, codec.encode(pad(pixels, 8)[None]).mean[0]


def test_the_gradient_is_that_of_the_pixels_that_are_there(codec: Codec) -> None:
    """Compare it with finite differences, for an image that fills its last patches in part."""
    pixels, z = image_and_latents(codec, 21, 30)
    networks = Runner(codec.double(), CPU)
    nll, gradient = networks.nll_gradient(z.double(), pixels)
    direction = torch.randn(z.shape, generator=seeded(1)).double()
    ahead, behind = (networks.nll_gradient(z + e * direction, pixels)[0] for e in (1e-3, -1e-3))
    # log_prob is float32, so that differences of 1e7 nats are good to about one.
    assert (ahead - behind) / 2e-3 == pytest.approx((gradient * direction).sum().item(), rel=1e-2, abs=1e-4 * nll)
    assert all(parameter.grad is None for parameter in codec.parameters())


@pytest.mark.slow
def test_tiles_give_the_gradient_of_the_whole(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    least = tiling.least_tile(codec)
    pixels, z = image_and_latents(codec, 3 * least + 5, 2 * least + 3)
    whole, expected = tiling.nll_gradient(codec, z.clone(), pixels, None)
    calls: list[torch.Size] = []
    real = codec.likelihood_params
    monkeypatch.setattr(codec, "likelihood_params", lambda z: calls.append(z.shape) or real(z))
    tiled, found = tiling.nll_gradient(codec, z.clone(), pixels, least)
    assert len(calls) > 4 and max(max(shape[2:]) for shape in calls) <= least // 8
    assert tiled == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, size in enumerate([(24, 16), (17, 33), (24, 16), (40, 40)]):
        draw(tmp_path / "photos" / f"{i}.png", *size, seed=i)
    return tmp_path / "photos"


def encode(codec: Codec, photos: Path, folder: Path, batch_size: int = 4, **options: Any) -> dict[str, bytes]:
    compute = dataclasses.replace(CPU, batch_size=batch_size)
    assert not make("streams", codec, photos, folder, compute, **options).failures
    return files_of(folder)


@pytest.mark.slow
def test_folders_are_refined_and_made_again_with_other_rounds(codec: Codec, photos: Path, tmp_path: Path) -> None:
    plain, refined = (encode(codec, photos, tmp_path / str(n), refine=n) for n in (0, 2))
    assert plain.keys() == refined.keys() and plain != refined
    assert encode(codec, photos, tmp_path / "0", refine=2) == refined
    assert encode(codec, photos, tmp_path / "1", batch_size=1, refine=2) == refined
    plain, refined = (encode(codec, photos / "0.png", tmp_path / f"rate {n}", refine=n, bpp=9.0) for n in (0, 1))
    assert plain != refined


def test_what_memory_cannot_hold_fails(
    codec: Codec, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Runner.nll_gradient

    def scarce(self: Runner, z: torch.Tensor, pixels: torch.Tensor) -> Any:
        if pixels.shape[1] == 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, z, pixels)

    monkeypatch.setattr(Runner, "nll_gradient", scarce)
    summary = make("streams", codec, photos, tmp_path / "out", refine=1)
    assert summary.done == 3 and "memory ran out" in summary.failures["3.png"]


@pytest.mark.slow
def test_measured_files_are_refined(codec: Codec, photos: Path) -> None:
    options = (RateDistortionOptions(steps=(0.7, 1.0), refine=n, anchors=()) for n in (0, 4))
    plain, refined = (rate_distortion(Runner(codec, CPU), photos, chosen, quiet=True) for chosen in options)
    assert refined.codecs == ["context", "factorized", "refined"] and "refined" not in plain.codecs
    assert refined.curve_points("context") == plain.curve_points("context")
    for before, after in zip(plain.curve_points("context"), refined.curve_points("refined"), strict=True):
        assert before.setting.value == after.setting.value and before.ideal_bpp != after.ideal_bpp
    assert "4 rounds of `encode --refine`" in refined.settings["refined"]
