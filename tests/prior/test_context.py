"""The context prior is integer arithmetic: the same whatever computes it, and blind to what is not decoded yet."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.prior import context
from latent_codec.prior.context import ContextConfig, ContextPrior, Layer, PassNetwork, Prediction, pass_layouts
from latent_codec.prior.factorized import LEVELS, FactorizedPrior
from latent_codec.prior.passes import PayloadSettings, decode, encode, quantize
from latent_codec.prior.priors import Priors, from_tensors, to_header, to_tensors
from latent_codec.prior.quantizer import LIMIT, Quantized, Scaled
from latent_codec.prior.rans import Coder
from latent_codec.prior.tables import Tables
from tests.support import reference_decoder
from tests.support.prior import context_prior, context_tables

tables = functools.cache(context_tables)
SHAPES = [((1, 3), ()), ((4,), ()), ((2, 1, 2), ()), ((1, 3), (2,)), ((4,), (1,)), ((2, 1, 2), (1, 0, 3))]
"""Groups and levels."""

LARGE = (1, 3), (2,)
"""With passes of every kind."""

Shape = tuple[tuple[int, ...], tuple[int, ...]]


@functools.cache
def prior(
    groups: tuple[int, ...], levels: tuple[int, ...] = (), seed: int = 0, *, centred: bool = True
) -> ContextPrior:
    return context_prior(groups, 8, seed, tables(), centred=centred, levels=levels)


def flat_tables(count: int) -> Tables:
    return Tables(np.full(2 * count, 2**23), np.full(count, 2), np.zeros(count, np.int64))


def as_priors(context: ContextPrior) -> Priors:
    factorized = FactorizedPrior(context.channels, None, flat_tables(LEVELS * context.channels))
    return Priors(np.ones(context.channels, np.float32), factorized, context)


def as_reference(context: ContextPrior) -> reference_decoder.Model:
    tensors = {name: tensor.numpy() for name, tensor in to_tensors(as_priors(context)).items()}
    return reference_decoder.Model({}, {"context": dataclasses.asdict(context.config)}, tensors, "")


def image(channels: int, h: int, w: int, step: int, seed: int | None, data: int = 0) -> Scaled:
    """Small values mostly, some of the largest; whole steps."""
    rng = np.random.default_rng(data)
    values = np.round(rng.standard_t(1.5, (channels, h, w)) * 2).clip(-LIMIT, LIMIT)
    values[rng.random(values.shape) < 0.02] = LIMIT
    return Scaled(values, step, seed)


def fine(image: Scaled) -> np.ndarray:
    return image.latents.astype(np.int64) * 2**17 + image.dither()


def choices(context: ContextPrior, images: list[Scaled], device: str = "cpu") -> list[Prediction]:
    """What every pass decodes by if all of the images were known, which no decoder ever has: all that matters here."""
    known, dithers = (np.stack(arrays) for arrays in zip(*((fine(i), i.dither()) for i in images), strict=True))
    dithered, steps = np.array([i.seed is not None for i in images]), np.array([i.step for i in images])
    return [context.select(n, known, dithers, dithered, steps, device) for n in range(len(context.layouts))]


def assert_equal(found: list[Prediction], expected: list[Prediction]) -> None:
    for one, other in zip(found, expected, strict=True):
        for array, expected_array in zip(one, other, strict=True):
            np.testing.assert_array_equal(array, expected_array)


def assert_as_the_format_says(context: ContextPrior, q: Scaled) -> None:
    for number, found in enumerate(choices(context, [q])):
        expected = reference_decoder.choose(
            as_reference(context), number, fine(q), q.dither(), q.step, q.seed is not None
        )
        assert found.offset.ravel().tolist() == expected.offsets
        assert found.centre.ravel().tolist() == expected.centres
        assert found.table.ravel().tolist() == expected.tables


@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(16, 65535),
    st.none() | st.integers(0, 2**64 - 1),
    st.integers(0, 99),
    st.booleans(),
)
def test_the_network_is_plain_int64_arithmetic(
    shape: Shape, weights: int, h: int, w: int, step: int, seed: int | None, data: int, centred: bool
) -> None:
    groups, levels = shape
    context = prior(groups, levels, weights, centred=centred or bool(levels))
    assert_as_the_format_says(context, image(sum(groups), h, w, step, seed, data))


def test_sums_at_the_limit_of_float32_are_exact() -> None:
    """All weights and inputs as large as can be, rows of 936 of them, and a bias that fills 2^24 to the last unit."""
    rng = np.random.default_rng(0)
    config = ContextConfig(groups=(100, 1), width=104, centred=True)

    def layer(inputs: int, outputs: int, shift: int) -> Layer:
        weight = torch.from_numpy(rng.choice([-127, 127], (outputs, inputs)).astype(np.int8))
        room = 2**24 - 1 - 127 * 127 * inputs - 2 ** (shift - 1)
        bias = torch.from_numpy(rng.choice([-room, room], outputs).astype(np.int32))
        return Layer(weight, bias, torch.full((outputs,), shift, dtype=torch.int32))

    nets = []
    for span in pass_layouts(config):
        sizes = ((span.inputs + 4) * 9, 104), (104 * 9, 104), (104, 104), (104, 2 * (span.stop - span.start))
        nets.append(
            PassNetwork(*[tuple(layer(*size, shift) for size, shift in zip(sizes, (17, 16, 1, 1), strict=True))])
        )
    gain, zeros = np.full(101, 2**15), np.zeros(101, np.int64)
    extreme = ContextPrior(config, np.arange(101), gain, zeros, nets, tables())
    values = rng.choice([-LIMIT, LIMIT], (101, 3, 4)).astype(np.float64)
    assert_as_the_format_says(extreme, Scaled(values, 65535, None))
    assert_as_the_format_says(extreme, Scaled(values, 65535, 3))


@pytest.fixture(scope="module")
def several() -> list[Scaled]:
    """Images of one shape, large enough for several strips and for work in several threads."""
    return [image(4, 33, 47, 1024 + 500 * i, i if i % 2 else None, i) for i in range(3)]


@pytest.fixture(scope="module")
def plain(several: list[Scaled]) -> list[Prediction]:
    return choices(prior(*LARGE), several)


@pytest.mark.parametrize("strip", [1, 300, 1000])
def test_strips_give_what_the_whole_gives(
    monkeypatch: pytest.MonkeyPatch, strip: int, several: list[Scaled], plain: list[Prediction]
) -> None:
    monkeypatch.setattr(context, "_STRIP", strip)
    assert_equal(choices(prior(*LARGE), several), plain)


def test_a_batch_gives_what_each_image_gives(several: list[Scaled], plain: list[Prediction]) -> None:
    alone = [choices(prior(*LARGE), [q]) for q in several]
    for number, whole in enumerate(plain):
        assert_equal([Prediction(*map(np.concatenate, zip(*(a[number] for a in alone), strict=True)))], [whole])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_do_not_matter(threads: Callable[[int], None], several: list[Scaled], plain: list[Prediction]) -> None:
    for count in (1, 2, 3):
        threads(count)
        assert_equal(choices(prior(*LARGE), several), plain)


def test_float64_as_other_devices_use_it_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, several: list[Scaled], plain: list[Prediction]
) -> None:
    monkeypatch.setattr(context, "_dtype", lambda device: torch.float64)
    assert_equal(choices(prior(*LARGE), several), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same(several: list[Scaled], plain: list[Prediction]) -> None:
    assert_equal(choices(prior(*LARGE), several, "cuda"), plain)


@pytest.fixture
def matmul_precision() -> Iterator[Callable[[str], None]]:
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_coarse_matrix_products_do_not_matter(
    matmul_precision: Callable[[str], None], precision: str, several: list[Scaled], plain: list[Prediction]
) -> None:
    matmul_precision(precision)
    assert_equal(choices(prior(*LARGE), several), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_it_does_not_matter(dtype: torch.dtype, several: list[Scaled], plain: list[Prediction]) -> None:
    with torch.autocast("cpu", dtype):
        assert_equal(choices(prior(*LARGE), several), plain)


@given(st.sampled_from(SHAPES), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_a_pass_is_blind_to_what_is_not_decoded_yet(
    shape: Shape, h: int, w: int, dithered: bool, data: st.DataObject
) -> None:
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
    model = prior(*shape)
    images = [image(sum(shape[0]), *size, 700 + i, i if i % 2 else None, i) for i in range(4)]
    codings = quantize(model, images, "cpu")
    payloads = [encode(Coder(tables()), coding.passes) for coding in codings]
    assert payloads == [encode(Coder(tables()), quantize(model, [q], "cpu")[0].passes) for q in images]
    settings = [PayloadSettings(q.latents.shape, q.step, q.seed) for q in images]  # pyright: ignore[reportArgumentType]
    payloads[1], payloads[2] = payloads[1][:-4], b"\xff" * 20
    found = decode(model, Coder(tables()), payloads, settings, "cpu")
    assert [isinstance(f, Quantized) for f in found] == [True, False, False, True]
    for i in (0, 3):
        one = found[i]
        assert isinstance(one, Quantized)
        np.testing.assert_array_equal(one.fine, codings[i].quantized.fine)
        assert (one.step, one.seed) == (images[i].step, images[i].seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_centred_prior_expects_is_coded_as_zeros(shape: Shape) -> None:
    model = prior(*shape)
    expected = np.zeros((1, sum(shape[0]), 6, 5), np.int64)
    steps, none = np.array([1500]), np.zeros(1, bool)
    for number, span in enumerate(model.layouts):
        choice = model.select(number, expected, np.zeros_like(expected), none, steps, "cpu")
        rows, columns = np.nonzero(span.where((6, 5)))
        expected[:, model.order[span.start : span.stop][:, None], rows, columns] = choice.offset
    assert len(np.unique(expected % 2**17)) > 5 and not (expected % 2**14).any()  # eighths of a step
    (coding,) = quantize(model, [Scaled(expected[0] / 2**17, 1500, None)], "cpu")
    np.testing.assert_array_equal(coding.quantized.fine, expected[0])
    assert not any(values.any() for values, _ in coding.passes)


# Unsound models


def changed(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update(fields)


def changed_layer(number: int, i: int, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        layers = list(arguments["networks"][number].layers)
        layers[i] = layers[i]._replace(**{name: f(getattr(layers[i], name)) for name, f in fields.items()})
        arguments["networks"][number] = PassNetwork(tuple(layers))  # pyright: ignore[reportArgumentType]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(config=ContextConfig(groups=(), width=8)), "groups"),
        (changed(config=ContextConfig(groups=(4, 0), width=8)), "groups"),
        (changed(config=ContextConfig(groups=(5, -1), width=8)), "groups"),
        (changed(config=ContextConfig(groups=(1, 3), width=0)), "width 0"),
        (changed(config=ContextConfig(groups=(1, 3), width=8, centred=True, levels=(0, 0, 1))), "levels"),
        (changed(config=ContextConfig(groups=(1, 3), width=8, centred=True, levels=(7,))), "levels"),
        (changed(config=ContextConfig(groups=(1, 3), width=8, centred=True, levels=(-1,))), "levels"),
        (changed(config=ContextConfig(groups=(1, 3), width=8, levels=(1,))), "centred"),
        (changed(config=ContextConfig(groups=(1, 3), width=8, centred=True, levels=(1,))), "networks"),
        (changed(config=ContextConfig(groups=(1, 3), width=9)), "shape"),
        (changed(config=ContextConfig(groups=(3, 1), width=8)), "shape"),
        (changed(config=ContextConfig(groups=(4,), width=8)), "networks"),
        (changed(config=ContextConfig(groups=(1, 4), width=8)), "order"),
        (changed(order=np.array([0, 1, 2, 2])), "order"),
        (changed(order=np.array([1, 2, 3, 4])), "order"),
        (changed(order=np.array([[0, 1, 2, 3]])), "order"),
        (changed(order=np.array(0)), "order"),
        (changed(gain=np.array([1, 1, 1, 0])), "gains"),
        (changed(gain=np.array([1, 1, 1, 2**15 + 1])), "gains"),
        (changed(gain=np.array([1, 1, 1])), "gains"),
        (changed(gain=np.array(1)), "gains"),
        (changed(width_offset=np.zeros(5, np.int64)), "offsets"),
        (changed(tables=flat_tables(480)), "480 tables"),
        (changed_layer(0, 0, shift=lambda s: s * 0), "shifts by less"),
        (changed_layer(1, 2, shift=lambda s: s * 0 + 21), "shifts by less"),
        (changed_layer(2, 1, bias=lambda b: b * 0 + 2**24), "2\\^24"),
        (changed_layer(2, 1, bias=lambda b: b * 0 - 2**31), "2\\^24"),
        (changed_layer(3, 3, weight=lambda w: w[:, 1:]), "shape"),
        (changed_layer(3, 3, bias=lambda b: b[1:]), "shape"),
        (changed_layer(3, 3, shift=lambda s: s[None]), "shape"),
    ],
)
def test_unsound_models_are_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    sound = prior((1, 3))
    names = ("config", "order", "gain", "width_offset", "networks", "tables")
    arguments = {name: getattr(sound, name) for name in names} | {"networks": list(sound.networks)}
    ContextPrior(**arguments)
    change(arguments)
    with pytest.raises(ValueError, match=message):
        ContextPrior(**arguments)


def test_tensors_are_the_whole_prior() -> None:
    before = as_priors(prior((2, 1, 2)))
    after = from_tensors(to_header(before), to_tensors(before), 5, None)
    for name, tensor in to_tensors(before).items():
        assert torch.equal(to_tensors(after)[name], tensor)
    assert after.context is not None and after.context.config == before.context.config  # pyright: ignore
    assert after.stream_id("m", "context") == before.stream_id("m", "context")


def test_every_tensor_that_matters_to_a_stream_is_in_its_id() -> None:
    priors = as_priors(prior((1, 3)))
    model = as_reference(prior((1, 3)))
    ids = {kind: priors.stream_id("m", kind) for kind in ("context", "factorized")}
    assert len({*ids.values(), priors.stream_id("n", "context")}) == 3
    for name, tensor in model.tensors.items():
        array = tensor.copy()
        array.flat[-1] += 1
        other = model.tensors | {name: array}
        for kind, own in ids.items():
            assert model._replace(model_id="m").stream_id(kind) == own
            counts = name == "prior.base" or name.split(".")[1] == kind
            assert (model._replace(model_id="m", tensors=other).stream_id(kind) != own) == counts


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("context.gain", lambda t: None, "gain is missing"),
        ("context.gain", lambda t: t.long(), "int64, not torch.int32"),
        ("context.passes.3.layers.2.weight", lambda t: t.int(), "int32, not torch.int8"),
        ("context.passes.3.layers.2.weight", lambda t: None, "is missing"),
        ("context.passes.4.layers.0.weight", lambda t: torch.zeros(1), "unknown"),
        ("context.passes.0.layers.4.weight", lambda t: torch.zeros(1), "unknown"),
        ("context.counts", lambda t: t + 1, "frequency is outside"),
        ("context.order", lambda t: t[0], "order"),
        ("factorized.sizes", lambda t: t[1:], "one first value each"),
        ("factorized.first", lambda t: t.float(), "float32, not torch.int32"),
        ("base", lambda t: -t, "positive"),
        ("base", lambda t: t * torch.inf, "positive"),
        ("base", lambda t: t[:3], "positive"),
        ("base", lambda t: t.half(), "float16, not torch.float32"),
    ],
)
def test_unsound_tensors_are_refused(name: str, replace: Callable[[Any], Any], message: str) -> None:
    priors = as_priors(prior((1, 3)))
    tensors = to_tensors(priors)
    tensor = replace(tensors.pop(f"prior.{name}", None))
    if tensor is not None:
        tensors[f"prior.{name}"] = tensor
    with pytest.raises(ValueError, match=message):
        from_tensors(to_header(priors), tensors, 4, None)


def test_priors_of_other_channels_are_refused() -> None:
    priors = as_priors(prior((1, 3)))
    with pytest.raises(ValueError, match="5 positive"):
        from_tensors(to_header(priors), to_tensors(priors), 5, None)
    wider = to_tensors(priors) | {"prior.base": torch.ones(5)}
    with pytest.raises(ValueError, match="5 channels"):
        from_tensors(to_header(priors), wider, 5, None)
