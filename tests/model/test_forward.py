"""A codec works with what other people's programs do to a module: call, compile, export, wrap, and change its type."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks.layerwise_casting import apply_layerwise_casting
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from latent_codec.model.codebooks import Codes
from latent_codec.model.codec import Codec, CodecOutput
from latent_codec.model.config import FiniteScalarConfig, IdentityConfig, LinearConfig, VectorQuantizerConfig
from latent_codec.model.posteriors import DiagonalGaussian
from tests.support.networks import CLAMP, CONV, MLP, TINY_LITE, config_of, make_codec, seeded

PARTS: dict[str, tuple[Any, Any]] = {
    "lite": (TINY_LITE, CLAMP),
    "linear": (LinearConfig(patch=8, overlap=4), CLAMP),
    "conv": (CONV, CLAMP),
    "mlp": (MLP, CLAMP),
    "identity": (TINY_LITE, IdentityConfig()),
    "vq": (TINY_LITE, VectorQuantizerConfig(codes=8)),
    "fsq": (TINY_LITE, FiniteScalarConfig(levels=(3, 3, 4, 5))),
}
HALVES = [torch.float16, torch.bfloat16]


def made(name: str) -> Codec:
    backbone, bottleneck = PARTS[name]
    return make_codec(config_of(backbone, bottleneck=bottleneck))


def pixels(height: int = 32, width: int = 24) -> torch.Tensor:
    return 2 * torch.rand(2, 3, height, width, generator=seeded(1)) - 1


def same(found: CodecOutput, wanted: CodecOutput) -> bool:
    """Return whether two outputs agree to rounding, with every tensor of the posterior."""
    assert type(found) is CodecOutput and vars(found.posterior).keys() == vars(wanted.posterior).keys()
    pairs = zip(vars(found.posterior).values(), vars(wanted.posterior).values(), strict=True)
    return torch.allclose(found.reconstruction, wanted.reconstruction, atol=1e-5) and all(
        torch.allclose(a, b, atol=1e-5) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


SLOW = ("conv", "identity", "fsq")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PARTS])
@torch.no_grad()
def test_a_codec_is_called_compiled_and_exported_at_any_size(name: str) -> None:
    codec, x = made(name), pixels()
    wanted = codec(x)
    posterior = codec.encode(x)
    assert same(wanted, CodecOutput(posterior, codec.decode(posterior.mode())))
    # A graph break would be an error; the backend plays no part in that.
    compiled: Any = torch.compile(codec, fullgraph=True, backend="eager")
    assert same(compiled(x), wanted)
    size = {side: codec.factor * torch.export.Dim(f"side{side}", min=2, max=64) for side in (2, 3)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(codec, (x,), dynamic_shapes={"x": size}), file)
    file.seek(0)
    larger = pixels(48, 64)
    assert same(torch.export.load(file).module()(larger), codec(larger))


@pytest.mark.parametrize("name", ["lite", "identity", "vq", "fsq"])
def test_encode_and_decode_are_one_graph_each_for_every_bottleneck(name: str) -> None:
    codec, x = made(name), pixels()
    encode, decode = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (codec.encode, codec.decode))
    posterior, wanted = encode(x), codec.encode(x)
    found = decode(posterior.mode())
    assert same(CodecOutput(posterior, found), CodecOutput(wanted, codec.decode(wanted.mode())))
    (posterior.kl().sum() + found.square().sum()).backward()
    assert all(p.grad is not None for p in codec.backbone.parameters())
    if isinstance(posterior, Codes):
        quantizer: Any = codec.bottleneck
        look_up = torch.compile(quantizer.look_up, fullgraph=True, backend="aot_eager")
        assert torch.equal(look_up(posterior.indices), quantizer.look_up(posterior.indices))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_a_model_in_half_precision_takes_uint8_or_floats_and_gives_its_own_type(name: str, dtype: torch.dtype) -> None:
    codec, exact = made(name).to(dtype), made(name)
    levels = ((pixels() + 1) * 127.5).round().to(torch.uint8)
    x = exact.likelihood.from_uint8(levels)
    wanted = exact(x)
    for given in (levels, x, x.to(dtype), x.double()):
        posterior, reconstruction = codec(given)
        z = posterior.mode()
        assert {posterior.sample().dtype, posterior.mean.dtype, z.dtype, reconstruction.dtype} == {dtype}
        assert {codec.decode(z).dtype, codec.decode(z.float()).dtype} == {dtype}
        assert codec.decode_uint8(z).dtype == torch.uint8 and posterior.kl().dtype == torch.float32
        assert posterior.coded.dtype in (torch.float32, torch.int64)
        if not isinstance(posterior, Codes):  # a rounding error may choose another code
            torch.testing.assert_close(z.float(), wanted.posterior.mean, rtol=0.05, atol=0.05)
            torch.testing.assert_close(reconstruction.float(), wanted.reconstruction, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["lite", "linear", "conv", "vq"])
@torch.no_grad()
def test_weights_may_be_stored_in_8_bits_and_cast_by_layer(name: str) -> None:
    codec, x = made(name).bfloat16(), pixels().bfloat16()
    wanted = codec(x)
    apply_layerwise_casting(codec, torch.float8_e4m3fn, torch.bfloat16)
    assert next(codec.backbone.parameters()).dtype == torch.float8_e4m3fn
    found = codec(x)
    assert found.reconstruction.dtype == found.posterior.mean.dtype == torch.bfloat16
    assert (found.reconstruction - wanted.reconstruction).square().mean() < 0.1


def test_sample_draws_from_torchs_generator_and_from_one_that_is_given() -> None:
    posterior = made("lite").encode(pixels())
    assert isinstance(posterior, DiagonalGaussian)
    torch.manual_seed(3)
    drawn, next_one = posterior.sample(), posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(posterior.sample(), drawn) and not torch.equal(next_one, drawn)
    assert torch.equal(posterior.sample(seeded(3)), posterior.sample(seeded(3)))
    torch.manual_seed(3)
    assert torch.equal(made("lite")(pixels(), sample=True).reconstruction, made("lite").decode(drawn))


@pytest.mark.parametrize("unused", [False, True])
def test_a_codec_trains_in_distributed_data_parallel(unused: bool, tmp_path: Path) -> None:
    codec, alone = made("lite").train(), made("lite").train()
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(codec, find_unused_parameters=unused)
        for module in (parallel, alone):
            found = module(pixels())
            loss = found.posterior.kl().sum()
            (loss if unused else loss + found.reconstruction.square().sum()).backward()
        for parameter, other in zip(codec.parameters(), alone.parameters(), strict=True):
            found, wanted = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, other))
            assert torch.allclose(found, wanted)
    finally:
        distributed.destroy_process_group()


def test_compile_makes_encode_and_decode_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, seen = made("lite"), []
    wanted = codec.decode(codec.encode(pixels()).mode())
    codec.compile(backend=lambda graph, _: seen.append(graph) or graph)
    found = codec.decode(codec.encode(pixels()).mode())
    assert len(seen) == 2 and torch.allclose(found, wanted, atol=1e-6)
    calls: Any = torch.compile(made("lite"), backend=lambda graph, _: seen.append(graph) or graph)
    calls.decode(calls.encode(pixels()).mode())  # as the docstring says, torch compiles calls of the module alone
    assert len(seen) == 2 and calls(pixels()) and len(seen) == 3
