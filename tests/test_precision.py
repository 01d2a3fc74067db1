"""Nothing computes in float64 on a device that has none, as Apple's GPUs. A device of fake tensors stands in for it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latent_codec import noise, precision
from latent_codec.bitstream.stream_codec import StreamCodec
from latent_codec.images.geometry import Geometry
from latent_codec.model.codec import Codec
from latent_codec.model.config import DiscretizedLogisticConfig, FiniteScalarConfig, VectorQuantizerConfig
from latent_codec.prior.context import ContextConfig
from latent_codec.prior.quantizer import STEP_ONE
from tests.support.networks import CLAMP, FIXED, TINY_LITE, config_of, seeded
from train.config.presets import photo
from train.context_prior.network import ContextNet
from train.objectives.elbo import ELBO
from train.objectives.iwae import resampled

FAKE = torch.device("cuda")  # of which fake tensors may be without any such device


class NoFloat64(TorchDispatchMode):
    """Refuses operators that make float64 on the fake device, whose tensors have no values: those asked for are 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and (tensor.device.type, tensor.dtype) == ("cuda", torch.float64):
                raise TypeError(f"{func} makes float64")
        return made


def step(bottleneck: Any, likelihood: Any = FIXED) -> torch.Tensor:
    """Compute a training loss, with all noise."""
    codec = Codec(config_of(TINY_LITE, bottleneck=bottleneck, likelihood=likelihood))
    config = dataclasses.replace(photo().objective, mode_weight=float(bottleneck is CLAMP), mode_steps=(0.5, 2.0))
    x, labels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    return ELBO(config, codec, None)(x, keys(), labels, torch.ones(()), True).loss


def keys() -> torch.Tensor:
    return torch.arange(2)


def context_step() -> Any:
    statistics: Any = dataclasses.make_dataclass("Statistics", ["std"])(std=(1.0, 2.0, 0.5, 4.0))
    net = ContextNet(ContextConfig(groups=(1, 3), width=8), np.full(4, 0.1, np.float32), statistics)
    for name, buffer in list(net.named_buffers()):
        setattr(net, name, buffer.to(FAKE))
    return net.code(net.draw(torch.zeros(2, 4, 8, 8), keys(), (0.5, 2.0), 0.5))


WORK: dict[str, Callable[[], Any]] = {
    "gaussian": lambda: step(CLAMP),
    "logistic": lambda: step(CLAMP, DiscretizedLogisticConfig(components=2)),
    "fsq": lambda: step(FiniteScalarConfig(levels=(3, 3, 4, 5))),
    "vq": lambda: step(VectorQuantizerConfig(codes=8)),
    "context prior": context_step,
    "resampling": lambda: resampled(torch.zeros(5, 2), 3, noise.uniform(keys())),
    "below": lambda: noise.below(torch.tensor(7), keys()),
    "float64": lambda: precision.in_float64(torch.zeros(2)).sum(),
}


@pytest.mark.parametrize("name", WORK)
def test_what_runs_on_a_device_without_float64_makes_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), FAKE, NoFloat64():
        if name in ("gaussian", "context prior", "resampling", "below", "float64"):
            with pytest.raises(TypeError, match="makes float64"):  # where there is float64, it is used
                WORK[name]()
        monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cuda"})
        WORK[name]()


def test_files_of_a_device_without_float64_have_the_same_bytes(codec: Codec) -> None:
    mean = torch.randn(4, 4, 6, generator=seeded(0))
    geometry = Geometry(width=48, height=32, orientation=1, mode="RGB", background=None)
    coders = [StreamCodec(codec, device) for device in ("cpu", "mps")]  # whose priors the CPU computes
    ours, theirs = (bytes(c.compress([(c.scale(mean, STEP_ONE, None), geometry)])[0].data) for c in coders)
    assert ours == theirs


def test_uniform_without_float64_is_the_same_number_cut_to_24_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    many = torch.arange(10_000)
    exact = noise.uniform(many)
    monkeypatch.setattr(precision, "WITHOUT_FLOAT64", {"cpu"})
    found = noise.uniform(many)
    assert found.dtype == torch.float32 and torch.equal(found.double(), (exact * 2**24).floor() / 2**24)
