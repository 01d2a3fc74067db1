"""A model file's tensors are the whole of its priors, and a stream id covers every tensor that a stream depends on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from latent_codec.prior.priors import Priors, from_tensors, to_header, to_tensors
from tests.support.errors import rejected
from tests.support.prior import as_priors, as_reference, context_prior


@pytest.fixture(scope="module")
def priors() -> Priors:
    return as_priors(context_prior((1, 3), 8, 0, centred=True))


def test_tensors_are_the_whole_prior(priors: Priors) -> None:
    after = from_tensors(to_header(priors), to_tensors(priors), 4, None)
    for name, tensor in to_tensors(priors).items():
        assert torch.equal(to_tensors(after)[name], tensor)
    assert after.context is not None and to_header(after) == to_header(priors)
    assert after.stream_id("m", "context") == priors.stream_id("m", "context")


def test_every_tensor_that_matters_to_a_stream_is_in_its_id(priors: Priors) -> None:
    assert priors.context is not None
    model = as_reference(priors.context)._replace(model_id="m")
    ids = {kind: priors.stream_id("m", kind) for kind in ("context", "factorized")}
    assert len({*ids.values(), priors.stream_id("n", "context")}) == 3
    for name, tensor in model.tensors.items():
        array = tensor.copy()
        array.flat[-1] += 1
        other = model._replace(tensors=model.tensors | {name: array})
        for kind, own in ids.items():
            assert model.stream_id(kind) == own
            counts = name == "prior.base" or name.split(".")[1] == kind
            assert (other.stream_id(kind) != own) == counts


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
def test_unsound_tensors_are_refused(priors: Priors, name: str, replace: Callable[[Any], Any], message: str) -> None:
    tensors = to_tensors(priors)
    tensor = replace(tensors.pop(f"prior.{name}", None))
    if tensor is not None:
        tensors[f"prior.{name}"] = tensor
    rejected(message, from_tensors, to_header(priors), tensors, 4, None)


def test_priors_of_other_channels_are_refused(priors: Priors) -> None:
    for base, message in ((torch.ones(4), "5 positive"), (torch.ones(5), "5 channels")):
        rejected(message, from_tensors, to_header(priors), to_tensors(priors) | {"prior.base": base}, 5, None)
