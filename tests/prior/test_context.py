"""The context prior is exact integer arithmetic, whatever computes it, and reads only what is decoded already."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_codec.prior.context import ContextConfig, ContextPrior, Layer, pass_layouts
from latent_codec.prior.layout import Prediction
from latent_codec.prior.passes import decode, quantize
from latent_codec.prior.quantizer import FINE, LIMIT, Quantized, Scaled, stack
from latent_codec.prior.rans import Coder
from tests.support import reference_decoder
from tests.support.errors import rejected
from tests.support.prior import as_reference, context_prior, context_tables, flat_tables

SHAPES = [((1, 3), ()), ((4,), ()), ((2, 1, 2), ()), ((1, 3), (2,)), ((4,), (1,)), ((2, 1, 2), (1, 0, 3))]
"""Groups and levels."""

LARGE = (1, 3), (2,)
"""A shape with passes of every kind."""

Shape = tuple[tuple[int, ...], tuple[int, ...]]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
shapes, seeds, small = st.sampled_from(SHAPES), st.none() | st.integers(0, 2**64 - 1), st.integers(1, 6)


@functools.cache
def prior(groups: tuple[int, ...], levels: tuple[int, ...] = (), seed: int = 0, centred: bool = True) -> ContextPrior:
    return context_prior(groups, 8, seed, centred=centred, levels=levels)


def image(channels: int, h: int, w: int, step: int, seed: int | None, data: int = 0) -> Scaled:
    """Whole steps, mostly small, some of the largest."""
    rng = np.random.default_rng(data)
    values = np.round(rng.standard_t(1.5, (channels, h, w)) * 2).clip(-LIMIT, LIMIT)
    values[rng.random(values.shape) < 0.02] = LIMIT
    return Scaled(values, step, seed)


def fine(image: Scaled) -> np.ndarray:
    return image.latents.astype(np.int64) * FINE + image.settings.dither()


def predictions(context: ContextPrior, images: list[Scaled], device: str = "cpu") -> list[Prediction]:
    """Predict every pass from the whole images, which no decoder ever has; for arithmetic that does not matter."""
    known, batch = np.stack([fine(i) for i in images]), stack([i.settings for i in images])
    return [context.predict(n, known, batch, device) for n in range(len(context.layouts))]


def assert_as_the_format_says(context: ContextPrior, q: Scaled) -> None:
    model, drawn = as_reference(context), q.seed is not None
    for number, found in enumerate(predictions(context, [q])):
        expected = reference_decoder.predict(model, number, fine(q), q.settings.dither(), q.step, drawn)
        for name in ("offset", "centre", "table"):
            assert getattr(found, name).ravel().tolist() == [getattr(one, name) for one in expected]


@pytest.mark.slow
@settings(max_examples=50)
@given(shapes, small, small, st.integers(16, 65535), seeds, st.integers(0, 99), st.booleans())
def test_networks_are_in_int64(
    shape: Shape, h: int, w: int, step: int, seed: int | None, data: int, centred: bool
) -> None:
    groups, levels = shape
    context = prior(groups, levels, data % 3, centred=centred or bool(levels))
    assert_as_the_format_says(context, image(sum(groups), h, w, step, seed, data))


def test_sums_at_the_limit_of_float32_are_exact() -> None:
    """All weights and inputs are as large as can be, in rows of 936, and a bias fills 2^24 to the last unit."""
    rng = np.random.default_rng(0)
    config = ContextConfig(groups=(100, 1), width=104, centred=True)

    def layer(inputs: int, outputs: int, shift: int) -> Layer:
        weight = torch.from_numpy(rng.choice([-127, 127], (outputs, inputs)).astype(np.int8))
        room = 2**24 - 1 - 127 * 127 * inputs - 2 ** (shift - 1)
        bias = torch.from_numpy(rng.choice([-room, room], outputs).astype(np.int32))
        return Layer(weight, bias, torch.full((outputs,), shift, dtype=torch.int32))

    nets = []
    for layout in pass_layouts(config):
        sizes = ((layout.inputs + 4) * 9, 104), (104 * 9, 104), (104, 104), (104, 2 * (layout.stop - layout.start))
        nets.append(tuple(layer(*size, shift) for size, shift in zip(sizes, (17, 16, 1, 1), strict=True)))
    gain, zeros = np.full(101, 2**15), np.zeros(101, np.int64)
    extreme = ContextPrior(config, np.arange(101), gain, zeros, nets, context_tables())
    values = rng.choice([-LIMIT, LIMIT], (101, 3, 4)).astype(np.float64)
    for seed in (None, 3):
        assert_as_the_format_says(extreme, Scaled(values, 65535, seed))


@pytest.fixture(scope="module")
def several() -> list[Scaled]:
    """Images of one shape, large enough for several strips and for work in several threads."""
    return [image(4, 33, 47, 1024 + 500 * i, i if i % 2 else None, i) for i in range(3)]


@pytest.fixture(scope="module")
def plain(several: list[Scaled]) -> list[Prediction]:
    return predictions(prior(*LARGE), several)


@contextlib.contextmanager
def torch_setting(name: str, value: Any) -> Iterator[None]:
    before = getattr(torch, f"get_{name}")()
    getattr(torch, f"set_{name}")(value)
    yield
    getattr(torch, f"set_{name}")(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("around", "fields", "device"),
    [
        *((contextlib.nullcontext(), {"max_positions": n}, "cpu") for n in (1, 300, 1000)),
        *((contextlib.nullcontext(), {"dtype": dtype}, "cpu") for dtype in (torch.float64, torch.float32)),
        *((torch_setting("num_threads", n), {}, "cpu") for n in (1, 2, 3)),
        *((torch_setting("float32_matmul_precision", p), {}, "cpu") for p in ("medium", "high")),
        *((torch.autocast("cpu", dtype), {}, "cpu") for dtype in (torch.bfloat16, torch.float16)),
        pytest.param(contextlib.nullcontext(), {}, "cuda", marks=on_cuda),
    ],
)
def test_how_it_is_computed_does_not_matter(
    around: Any, fields: dict[str, Any], device: str, several: list[Scaled], plain: list[Prediction]
) -> None:
    context = copy.copy(prior(*LARGE))
    vars(context).update(fields)
    with around:
        found = predictions(context, several, device)
    for own, expected in zip(found, plain, strict=True):
        for array, expected_array in zip(own, expected, strict=True):
            np.testing.assert_array_equal(array, expected_array)


@pytest.mark.slow
@settings(max_examples=50)
@given(shapes, small, small, st.booleans(), st.data())
def test_a_pass_is_blind_to_what_is_to_come(shape: Shape, h: int, w: int, dithered: bool, data: st.DataObject) -> None:
    model, q = prior(*shape), image(sum(shape[0]), h, w, 1024, 3 if dithered else None)
    place = tuple(data.draw(st.integers(0, n - 1)) for n in q.latents.shape)
    changed = q.latents.copy()
    changed[place] = data.draw(st.integers(-LIMIT, LIMIT).filter(lambda v: abs(v - q.latents[place]) > 1))
    before, after = (quantize(model, [x], "cpu")[0].passes for x in (q, q._replace(latents=changed)))
    for (values, chosen), (others, also_chosen) in zip(before, after, strict=True):
        np.testing.assert_array_equal(also_chosen, chosen)
        if (values != others).any():
            assert (values != others).sum() == 1  # its own pass: all later ones may differ
            break
    else:
        pytest.fail("the change is in no pass")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (7, 9)])
def test_decoding_undoes_encoding_and_a_damaged_neighbour_does_not_matter(shape: Shape, size: tuple[int, int]) -> None:
    model, coder = prior(*shape), Coder(context_tables())
    images = [image(sum(shape[0]), *size, 700 + i, i if i % 2 else None, i) for i in range(4)]
    codings = quantize(model, images, "cpu")
    payloads = [coder.encode(coding.passes) for coding in codings]
    assert payloads == [coder.encode(quantize(model, [q], "cpu")[0].passes) for q in images]
    payloads[1], payloads[2] = payloads[1][:-4], b"\xff" * 20
    found = decode(model, coder, payloads, [q.settings for q in images], "cpu")
    assert [isinstance(f, Quantized) for f in found] == [True, False, False, True]
    for i in (0, 3):
        one = found[i]
        assert isinstance(one, Quantized)
        np.testing.assert_array_equal(one.fine, codings[i].quantized.fine)
        assert (one.step, one.seed) == (images[i].step, images[i].seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_centred_prior_predicts_is_coded_as_zeros(shape: Shape) -> None:
    model, size = prior(*shape), (sum(shape[0]), 6, 5)
    predicted = np.zeros((1, *size), np.int64)
    batch = stack([Scaled(predicted[0], 1500, None).settings])
    for number, layout in enumerate(model.layouts):
        layout.put(predicted, model.order, model.predict(number, predicted, batch, "cpu").offset)
    assert len(np.unique(predicted % FINE)) > 5 and not (predicted % (FINE // 8)).any()  # eighths of a step
    (coding,) = quantize(model, [Scaled(predicted[0] / FINE, 1500, None)], "cpu")
    np.testing.assert_array_equal(coding.quantized.fine, predicted[0])
    assert not any(values.any() for values, _ in coding.passes)


Change = Callable[[dict[str, Any]], None]


def changed(**fields: Any) -> Change:
    return lambda arguments: arguments.update(fields)


def config(groups: tuple[int, ...], width: int = 8, **fields: Any) -> Change:
    return changed(config=ContextConfig(groups=groups, width=width, **fields))


def changed_layer(number: int, i: int, **fields: Any) -> Change:
    def change(arguments: dict[str, Any]) -> None:
        layers = list(arguments["networks"][number])
        layers[i] = layers[i]._replace(**{name: f(getattr(layers[i], name)) for name, f in fields.items()})
        arguments["networks"][number] = tuple(layers)

    return change


UNSOUND: dict[str, list[Change]] = {
    "groups": [config(()), config((4, 0)), config((5, -1))],
    "width 0": [config((1, 3), 0)],
    "levels": [config((1, 3), centred=True, levels=n) for n in ((0, 0, 1), (-1,), (7,))],
    "centred": [config((1, 3), levels=(1,))],
    "networks": [config((1, 3), centred=True, levels=(1,)), config((4,))],
    "order": [config((1, 4))] + [changed(order=np.array(a)) for a in ([0, 1, 2, 2], [1, 2, 3, 4], [[0, 1, 2, 3]], 0)],
    "gains": [changed(gain=np.array(a)) for a in ([1, 1, 1, 0], [1, 1, 1, 2**15 + 1], [1, 1, 1], 1)],
    "offsets": [changed(width_offset=np.zeros(5, np.int64))],
    "not 480": [changed(tables=flat_tables(480))],
    "shifts by 0": [changed_layer(0, 0, shift=lambda s: s * 0)],
    "21 bits": [changed_layer(1, 2, shift=lambda s: s * 0 + 21)],
    "2\\^24": [changed_layer(2, 1, bias=lambda b: b * 0 + 2**24), changed_layer(2, 1, bias=lambda b: b * 0 - 2**31)],
    "shape": [
        *(config((1, 3), 9), config((3, 1)), changed_layer(3, 3, weight=lambda w: w[:, 1:])),
        *(changed_layer(3, 3, bias=lambda b: b[1:]), changed_layer(3, 3, shift=lambda s: s[None])),
    ],
}


@pytest.mark.parametrize(("message", "change"), [(m, c) for m, changes in UNSOUND.items() for c in changes])
def test_unsound_models_are_refused(message: str, change: Change) -> None:
    sound = prior((1, 3))
    names = ("config", "order", "gain", "width_offset", "networks", "tables")
    arguments = {name: getattr(sound, name) for name in names} | {"networks": list(sound.networks)}
    ContextPrior(**arguments)
    change(arguments)
    rejected(message, ContextPrior, **arguments)
