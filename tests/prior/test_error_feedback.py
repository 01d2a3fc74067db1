"""Error feedback lowers the error of the pixels, is exact whatever computes it, and is the encoder's alone."""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, pad

from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.model.codec import Codec
from latent_codec.model.config import LinearConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.prior.context import ContextConfig, ContextPrior
from latent_codec.prior.error_feedback import REACH, Feedback
from latent_codec.prior.passes import quantize
from latent_codec.prior.quantizer import FINE, STEP_ONE, Scaled
from tests.support.errors import refused
from tests.support.latents import geometry
from tests.support.networks import CONV, config_of, make_codec, seeded
from tests.support.prior import context_prior, feedback
from train.context_prior.error_feedback import measure
from train.context_prior.network import ContextNet, logistic_tables

WIDE = 2 * REACH + 1


def images(channels: int, count: int, size: tuple[int, int]) -> list[Scaled]:
    rng = np.random.default_rng(1)
    return [Scaled(rng.standard_t(3, (channels, *size)), STEP_ONE, None) for _ in range(count)]


def rounded(prior: ContextPrior, subjects: list[Scaled], use: Feedback | None = None) -> list[np.ndarray]:
    return [coding.quantized.fine for coding in quantize(prior, subjects, "cpu", use)]


@torch.no_grad()
def zeros(codec: Codec, groups: tuple[int, ...], levels: tuple[int, ...]) -> ContextNet:
    """Return a network that predicts 0 everywhere, so that it has no part in how values are rounded."""
    assert codec.priors is not None and codec.statistics is not None
    config = ContextConfig(groups=groups, width=8, centred=True, levels=levels)
    net = ContextNet(config, codec.priors.channel_steps, codec.statistics)
    for parameter in net.parameters():
        parameter.zero_()
    return net


@pytest.fixture
def linear(codec: Codec) -> Codec:
    """A codec of overlapping patches, whose errors overlap too, with a context prior of zeros."""
    linear = make_codec(dataclasses.replace(codec.config, backbone=LinearConfig(patch=8, overlap=4)), seed=3)
    with torch.no_grad():
        linear.backbone.decoder.weight.copy_(torch.rand(4, 3, 16, 16, generator=seeded(3)) - 0.3)  # pyright: ignore
    assert codec.priors is not None
    ones: Any = dict.fromkeys(("std", "posterior_std"), (1.0,) * 4)
    codec.statistics = linear.statistics = LatentStatistics(source="", images=1, mean=(0.0,) * 4, **ones)
    linear.priors = codec.priors._replace(context=zeros(codec, (1,) * 4, (1,) * 4).freeze(logistic_tables()))
    return linear


def test_the_weights_are_the_gram_matrix_of_a_linear_decoder(linear: Codec) -> None:
    """Compute from the kernels the overlap of every two of them, at every distance."""
    assert linear.priors is not None
    weight = linear.backbone.decoder.weight.detach().double()  # pyright: ignore  (z, 3, 16, 16)
    drawn = weight * torch.from_numpy(linear.priors.channel_steps).double()[:, None, None, None]
    overlap = conv2d(pad(drawn, (8 * REACH,) * 4), drawn, stride=8)  # [j, i]: of j's kernel with i's moved
    gram = overlap.transpose(0, 1).flip(2, 3)
    expected = gram / gram[:, :, REACH, REACH].diagonal()[:, None, None, None]
    latents = torch.randn(3, 4, 20, 15, generator=seeded(0))
    found = measure(linear, latents, linear.priors.channel_steps)
    assert found is not None
    np.testing.assert_allclose(found.weights / 2**14, expected.clamp(-2, 2).numpy(), atol=2**-13)


def test_it_lowers_the_error_of_the_pixels(linear: Codec) -> None:
    assert linear.priors is not None and linear.priors.context is not None
    steps, prior = linear.priors.channel_steps, linear.priors.context
    latents = torch.randn(2, 4, 16, 16, generator=seeded(0))
    subjects = [image._replace(latents=image.latents * 5) for image in images(4, 4, (24, 24))]

    @torch.no_grad()
    def error(use: Feedback | None) -> float:
        total = 0.0
        for image, fine in zip(subjects, rounded(prior, subjects, use), strict=True):
            wrong = torch.from_numpy(fine / FINE - image.latents).float() * torch.from_numpy(steps)[:, None, None]
            pixels = linear.decode(wrong[None]) - linear.decode(torch.zeros_like(wrong)[None])
            total += pixels.square().sum().item()
        return total

    assert error(measure(linear, latents, steps)) < 0.95 * error(None)


@pytest.mark.parametrize("levels", [(), (2,), (1, 2)])
def test_it_is_the_same_in_batches_and_strips(levels: tuple[int, ...]) -> None:
    prior, use = context_prior((1, 3), 8, 0, centred=True, levels=levels), feedback(4)
    subjects = images(4, 3, (9, 14))
    whole = rounded(prior, subjects, use)
    assert any((a != b).any() for a, b in zip(whole, rounded(prior, subjects), strict=True))
    for positions in (1, 30, 2**20):
        in_strips = use._replace(max_positions=positions)
        for expected, subject in zip(whole, subjects, strict=True):
            np.testing.assert_array_equal(rounded(prior, [subject], in_strips)[0], expected)


def test_each_shift_is_the_exact_sum_over_its_neighbours() -> None:
    """No position sees beyond the image or its reach."""
    use = feedback(3)
    rng = np.random.default_rng(2)
    errors = rng.integers(-FINE, FINE, (2, 2, 6, 7)).astype(np.float64)
    seen, channels = np.array([2, 0]), np.array([1, 2])
    where = rng.random((6, 7)) < 0.5
    found = use.shift(errors, seen, channels, where)
    for b, g, (n, (y, x)) in itertools.product(range(2), range(2), enumerate(np.argwhere(where))):
        total = sum(
            int(use.weights[channels[g], seen[j], REACH + v - y, REACH + u - x]) * int(errors[b, j, v, u])
            for j in range(2)
            for v in range(max(0, y - REACH), min(6, y + REACH + 1))
            for u in range(max(0, x - REACH), min(7, x + REACH + 1))
        )
        assert found[b, g, n] == -total / 2**31


def test_decoded_values_and_draws_are_not_affected() -> None:
    """Errors of 0 shift nothing; a draw is rounded as without feedback, also beside a rounded image in one batch."""
    prior, use = context_prior((1, 3), 8, 0, centred=True, levels=(2,)), feedback(4)
    plain, drawn = images(4, 2, (8, 8))
    (coding,) = quantize(prior, [plain], "cpu", use)
    np.testing.assert_array_equal(rounded(prior, [coding.quantized.scaled()], use)[0], coding.quantized.fine)
    drawn = drawn._replace(seed=7)
    found = rounded(prior, [plain, drawn], use)
    assert np.array_equal(found[1], rounded(prior, [drawn])[0])
    assert not np.array_equal(found[0], rounded(prior, [plain])[0])
    assert (abs(found[1] / FINE - drawn.latents) <= 0.5 + 1 / FINE).all()


def test_training_rounds_as_a_file_does(codec: Codec) -> None:
    """The float network's own rounding agrees with the same prior's in integers, given the same feedback."""
    assert codec.priors is not None
    steps, use = codec.priors.channel_steps, feedback(4)
    nets = [zeros(codec, (1, 3), (2,)) for _ in range(2)]
    nets[0].round_by(use)
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()  # nothing of it is in a checkpoint
    z = torch.randn(3, 4, 8, 8, generator=seeded(1)) * torch.tensor(steps)[:, None, None] * 2
    step = torch.tensor([0.5, 1.0, 2.0])
    sizes = [(steps * float(s))[:, None, None] for s in step]
    scaled = [Scaled(m.double().numpy() / size, int(1024 * s), None) for m, size, s in zip(z, sizes, step, strict=True)]
    shares = []
    for net in nets:
        read = net.code(net.take(z, step)).latents / net.sizes(1024 * step)[:, net.inverse]
        files = np.stack(rounded(nets[0].freeze(logistic_tables()), scaled, use)) / FINE
        shares.append((abs(read.detach().numpy() - files) < 1e-3).mean())
    assert shares[0] > 0.995 > 0.98 > shares[1]  # of values: a sum in float32 may end beyond an edge


def test_streams_and_their_decoder_do_not_depend_on_it(codec: Codec) -> None:
    assert codec.priors is not None
    plain = StreamCodec(codec, "cpu")
    codec.priors = codec.priors._replace(feedback=feedback(4))
    fed = StreamCodec(codec, "cpu")
    assert fed.stream_id == plain.stream_id
    assert plain.feedback is None is StreamCodec(codec, "cpu", "factorized").feedback
    (image,) = images(4, 1, (8, 8))
    one, other = (s.compress([(image, geometry(64, 64))])[0] for s in (plain, fed))
    assert one.data != other.data
    np.testing.assert_array_equal(fed.code(image).quantized.fine, other.quantized.fine)  # what refinement prices
    assert np.array_equal(other.quantized.fine, rounded(codec.priors.context, [image], feedback(4))[0])  # pyright: ignore
    (latents,) = plain.decompress([unpack(other.data)])
    assert isinstance(latents, torch.Tensor) and torch.equal(latents, fed.dequantize(other.quantized))


def test_a_model_file_holds_it(codec: Codec, tmp_path: Path) -> None:
    assert codec.priors is not None
    codec.save(tmp_path / "plain.safetensors", half=True)
    codec.priors = codec.priors._replace(feedback=feedback(4))
    codec.save(tmp_path / "m.safetensors", half=True)
    found = Codec.load(tmp_path / "m.safetensors")
    assert found.priors is not None and found.priors.feedback is not None
    np.testing.assert_array_equal(found.priors.feedback.weights, feedback(4).weights)
    assert found.model_id == Codec.load(tmp_path / "plain.safetensors").model_id
    of_int32 = np.zeros((4, 4, 3, 3), np.int32)
    for wrong, message in ((feedback(3).weights, "not (4, 4, 3, 3)"), (of_int32, "torch.int32")):
        codec.priors = codec.priors._replace(feedback=Feedback(wrong))
        codec.save(tmp_path / "wrong.safetensors")
        refused(re.escape(message), Codec.load, tmp_path / "wrong.safetensors")


def test_without_neighbours_or_a_margin_there_is_no_feedback(codec: Codec) -> None:
    assert codec.priors is not None
    steps = codec.priors.channel_steps
    assert measure(codec, [torch.zeros(4, 2, 9)], steps) is measure(codec, [], steps) is None
    found = measure(codec, [torch.zeros(4, 3, 7)], steps)  # the smallest that has some
    assert found is not None and found.weights.shape == (4, 4, WIDE, WIDE)
    assert (found.weights[range(4), range(4), REACH, REACH] == 2**14).all()
    assert measure(make_codec(config_of(CONV)), torch.zeros(1, 4, 16, 16), steps) is None
