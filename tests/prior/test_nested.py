"""Test streams of nested priors: the first groups of channels alone, as many as are worth their bits."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from latent_codec.bitstream.container import OVERHEAD, unpack
from latent_codec.bitstream.stream_codec import StreamCodec, StreamReader
from latent_codec.model.codec import Codec
from latent_codec.prior.context import MAX_NESTED_GROUPS, ContextPrior
from latent_codec.prior.error_feedback import Feedback
from latent_codec.prior.passes import ideal_bits, quantize
from latent_codec.prior.quantizer import BITS_OF_ERROR, FINE, Scaled
from tests.bitstream.test_container import crafted
from tests.support.errors import refused, rejected
from tests.support.latents import geometry
from tests.support.networks import TINY_LITE, config_of, make_codec
from tests.support.prior import as_priors, context_prior, feedback

GROUPS, ENDS, Z = (1, 2, 3), (0, 1, 3, 6), 6


@functools.cache
def prior() -> ContextPrior:
    return context_prior(GROUPS, 8, seed=3, centred=True, levels=(1,), nested=True)


def image(seed: int, *, scale: float = 1.0, drawn: int | None = None) -> Scaled:
    """Return latents whose channels fall in size, as those of a model do."""
    spread = scale * np.array([9, 4, 2, 1, 0.5, 0.2])[:, None, None]
    return Scaled(np.random.default_rng(seed).laplace(size=(Z, 6, 8)) * spread, 1024, drawn)


@pytest.mark.parametrize("use", [None, feedback(Z)], ids=["plain", "feedback"])
def test_groups_are_the_same_whatever_follows_them(use: Feedback | None) -> None:
    (whole,) = quantize(prior(), [image(0)], "cpu", use, groups=3)
    for groups, end in enumerate(ENDS):
        (short,) = quantize(prior(), [image(0)], "cpu", use, groups=groups)
        np.testing.assert_array_equal(short.quantized.fine[:end], whole.quantized.fine[:end])
        assert not short.quantized.fine[end:].any() and short.groups == groups
        assert ideal_bits(prior(), short.passes) <= ideal_bits(prior(), whole.passes)


@pytest.mark.parametrize("scale", [4.0, 1.0, 0.3, 0.05, 0.0])
def test_an_image_keeps_the_groups_that_are_worth_their_bits(scale: float) -> None:
    one = image(1, scale=scale)

    def cost(groups: int) -> float:
        (coding,) = quantize(prior(), [one], "cpu", groups=groups)
        error = np.square(coding.quantized.fine / FINE - one.latents).sum()
        return ideal_bits(prior(), coding.passes) + BITS_OF_ERROR * error

    (chosen,) = quantize(prior(), [one], "cpu")
    heard = 1 + max(np.flatnonzero(np.abs(one.latents).max((1, 2)) >= 0.5), default=-1)
    least = min(range(1 + np.searchsorted(ENDS, heard)), key=cost)  # what would only hold zeros is not tried
    assert chosen.groups == least
    assert (chosen.groups == 0) == (scale < 0.1)


def test_neither_other_images_nor_draws_change_what_an_image_keeps() -> None:
    quiet = [image(seed, scale=0.02 * seed) for seed in range(1, 30)]  # a loud neighbour has them coded further
    images = [image(2, scale=0.3), image(3, scale=4.0), image(4, scale=0.0), *quiet, image(2, scale=0.3, drawn=7)]
    together = quantize(prior(), images, "cpu")
    for one, coding in zip(images, together, strict=True):
        (alone,) = quantize(prior(), [one], "cpu")
        assert alone.groups == coding.groups
        np.testing.assert_array_equal(alone.quantized.fine, coding.quantized.fine)
    assert together[-1].groups == 3  # of a draw, all


def codec() -> Codec:
    made = make_codec(config_of(TINY_LITE, z=Z, prefixes=(2, 4, 6)))
    made.priors = as_priors(prior())
    return made


def test_files_hold_their_groups_and_decode_to_all_channels() -> None:
    made = codec()
    coder, reader = StreamCodec(made, "cpu"), StreamReader(made, "cpu")
    sizes = []
    for scale, groups in ((4.0, 3), (0.3, None), (0.0, 0)):
        (file,) = coder.compress([(image(5, scale=scale), geometry(64, 48))])
        stream = unpack(file.data)
        assert stream.version == 4 and groups in (None, stream.groups)
        reader.check(stream)
        (z,) = reader.decompress([stream])
        assert isinstance(z, torch.Tensor) and torch.equal(z, coder.dequantize(file.quantized)) and len(z) == Z
        assert not z[ENDS[stream.groups or 0] :].any()
        sizes.append(len(file.data))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == OVERHEAD + 8


def test_a_stream_of_more_groups_than_there_are_is_refused() -> None:
    made = codec()
    (file,) = StreamCodec(made, "cpu").compress([(image(5), geometry(64, 48))])
    stream = unpack(crafted(file.data, flags=8 + 16 * 4))
    refused("damaged: it claims 4 groups of channels, and its prior has 3", StreamReader(made, "cpu").check, stream)


def test_a_nested_prior_has_the_models_order_and_few_groups() -> None:
    own = prior()
    parts = own.gain, own.width_offset, own.networks, own.tables
    rejected("in the model's order", ContextPrior, own.config, own.order[::-1].copy(), *parts)
    plain = dataclasses.replace(own.config, centred=False, levels=())
    rejected("must be centred", ContextPrior, plain, own.order, *parts)
    many = dataclasses.replace(own.config, groups=(1,) * (MAX_NESTED_GROUPS + 1))
    rejected("up to 15 groups, not 16", ContextPrior, many, np.arange(16), *parts)
