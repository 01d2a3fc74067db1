"""Make small priors with random integers that look like trained ones, and quantise latents without a prior."""

import dataclasses
import functools
import math

import numpy as np
import torch

from latent_codec.prior.context import SIGNALS, TABLES, ContextConfig, ContextPrior, Layer, pass_layouts, table_scale
from latent_codec.prior.error_feedback import REACH, Feedback
from latent_codec.prior.factorized import QUARTER_OCTAVES, FactorizedPrior
from latent_codec.prior.priors import Priors, to_tensors
from latent_codec.prior.quantizer import FINE, Quantized, scale, to_integers
from latent_codec.prior.tables import Tables, join, normalize
from tests.support import reference_decoder


@functools.cache
def context_tables() -> Tables:
    """Return tables of the logistic's masses, up to 6 scales to both sides; the escape has the rest."""
    return join([_table(*table_scale(table)) for table in range(TABLES)])


def _table(location: float, scale: float) -> tuple[int, np.ndarray]:
    last = math.ceil(6 * scale)
    edges = (np.arange(-last, last + 2) - 0.5 - location) / scale
    cumulative = 0.5 + 0.5 * np.tanh(edges / 2)
    return -last, normalize(np.r_[np.diff(cumulative) + 1e-9, 1 - cumulative[-1] + cumulative[0] + 1e-6])


def context_prior(
    groups: tuple[int, ...], width: int, seed: int, *, centred: bool, levels: tuple[int, ...] = (), nested: bool = False
) -> ContextPrior:
    """Return a prior with random weights over the whole range, and outputs of a few steps and of medium width."""
    rng = np.random.default_rng(seed)
    config = ContextConfig(groups=groups, width=width, centred=centred, levels=levels, nested=nested)
    channels = sum(groups)
    networks = []
    for span in pass_layouts(config):
        outputs = span.stop - span.start
        first = _layer(rng, (span.inputs + SIGNALS) * 9, width, 60, 32)
        second, third = _layer(rng, width * 9, width, 40, 32), _layer(rng, width, width, 40, 32)
        bias = np.r_[np.zeros(outputs), np.full(outputs, 50)]  # i = 40 is one step
        networks.append((first, second, third, _layer(rng, width, 2 * outputs, 40, 24, bias)))
    order, gain = rng.permutation(channels), 2 ** rng.integers(10, 13, channels) + rng.integers(0, 100, channels)
    order = np.arange(channels) if nested else order
    return ContextPrior(config, order, gain, rng.integers(-8, 9, channels), networks, context_tables())


def flat_tables(count: int) -> Tables:
    return Tables(np.full(2 * count, 2**23), np.full(count, 2), np.zeros(count, np.int64))


def as_priors(context: ContextPrior) -> Priors:
    """Return priors with this context prior and a factorised one of two symbols."""
    factorized = FactorizedPrior(context.channels, None, flat_tables(QUARTER_OCTAVES * context.channels))
    return Priors(np.ones(context.channels, np.float32), factorized, context)


def as_reference(context: ContextPrior) -> reference_decoder.Model:
    """Return a model for the reference decoder that has nothing but these priors."""
    tensors = {name: tensor.numpy() for name, tensor in to_tensors(as_priors(context)).items()}
    return reference_decoder.Model({}, {"context": dataclasses.asdict(context.config)}, tensors, "")


def quantize_plainly(mean: torch.Tensor, channel_steps: np.ndarray, step: int, seed: int | None) -> Quantized:
    """Quantise latents (z, h, w) around 0 or the dither; raise `UserError` as `quantizer.scale` does."""
    scaled = scale(mean, channel_steps, step, seed)
    dithers = scaled.settings.dither()
    return Quantized(to_integers(scaled.latents, dithers, np.array(seed is not None)) * FINE + dithers, step, seed)


def feedback(channels: int, seed: int = 0) -> Feedback:
    """Return random weights as large as a real decoder's."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 2**14 / 20, (channels, channels, *[2 * REACH + 1] * 2)).round().astype(np.int16)
    return Feedback(weights)


def _layer(
    rng: np.random.Generator, inputs: int, outputs: int, size_in: float, size_out: float, bias: np.ndarray | None = None
) -> Layer:
    """Return a layer with outputs of about `size_out` for inputs of about `size_in`."""
    weight = rng.integers(-127, 128, (outputs, inputs))
    shift = np.clip(np.round(np.log2(73 * size_in * math.sqrt(inputs) / size_out) + rng.uniform(-1, 1, outputs)), 1, 20)
    bias = (rng.normal(size=outputs) * size_out / 2 if bias is None else bias) * 2**shift
    bias, shift = (torch.from_numpy(np.round(values).astype(np.int32)) for values in (bias, shift))
    return Layer(torch.from_numpy(weight.astype(np.int8)), bias, shift)
