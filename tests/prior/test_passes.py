"""Test that whatever an encoder may write, a decoder reads."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from latent_codec.bitstream.container import unpack
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.images.geometry import Geometry
from latent_codec.model.codec import Codec
from latent_codec.prior.quantizer import LIMIT, MAX_STEP, MIN_STEP, Scaled, step_code
from tests.support.prior import feedback

EXTREMES = [[LIMIT], [LIMIT, 0.3], [LIMIT - 0.3, LIMIT], [LIMIT, LIMIT - 0.5, LIMIT - 1, LIMIT / 2, 0]]
GEOMETRY = Geometry(width=48, height=48, orientation=1, mode="RGB", background=None)


@pytest.mark.parametrize("prior", ["context", "factorized"])
def test_latents_at_the_ends_of_the_range_are_decoded_as_they_were_written(codec: Codec, prior: Any) -> None:
    """Rounding around predictions, error feedback and dither stay within what a decoder takes."""
    assert codec.priors is not None
    codec.priors = codec.priors._replace(feedback=feedback(4))
    coder, rng = StreamCodec(codec, "cpu", prior), np.random.default_rng(0)
    for values, signs, step, seed in itertools.product(
        EXTREMES, ([1], [-1], [1, -1]), (MIN_STEP, 1.0, MAX_STEP), (None, 5)
    ):
        latents = rng.choice(values, (4, 6, 6)) * rng.choice(signs, (4, 6, 6))
        (file,) = coder.compress([(Scaled(latents, step_code(step), seed), GEOMETRY)])
        (decoded,) = coder.decompress([unpack(file.data)])
        assert isinstance(decoded, torch.Tensor), (values, signs, step, seed)
        assert torch.equal(decoded, coder.dequantize(file.quantized))
        assert np.abs(file.quantized.values - latents).max() < 2
