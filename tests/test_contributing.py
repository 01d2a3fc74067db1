"""Test the instructions of CONTRIBUTING.md by following them with toy parts."""

import dataclasses
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Union, cast, get_args

import pytest
import torch
import tyro
from torch import nn

from latent_codec.cli import Command
from latent_codec.interop.caches import cache
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.read import read_cache
from latent_codec.interop.caches.registry import CacheName
from latent_codec.interop.caches.write import write_cache
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.codec import Codec
from latent_codec.model.config import BackboneConfig, CodecConfig, LikelihoodConfig
from latent_codec.model.likelihoods import LIKELIHOODS, Likelihood
from latent_codec.model.networks import BACKBONES, Backbone, BackboneShape
from tests.support.caches import store
from tests.support.data import ROOT


def _config(codec: Codec, **parts: Any) -> CodecConfig:
    return dataclasses.replace(codec.config, **parts)


def test_every_config_has_its_part_in_the_registry() -> None:
    assert {config.kind for config in get_args(BackboneConfig)} == set(BACKBONES)
    assert {config.kind for config in get_args(LikelihoodConfig)} == set(LIKELIHOODS)


def test_the_table_of_places_names_what_is_there() -> None:
    table = re.findall(r"^\| Where .*\| `(\S+)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(table) == 9
    for path, name in table:
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b", (ROOT / path).read_text(), re.MULTILINE), (path, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig:
    kind: ClassVar[str] = "toy"
    patch: int


class PatchBackbone(Backbone):
    """Map each patch to one latent element and back."""

    encoder_margin = decoder_margin = 0

    def __init__(self, config: PatchConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.factor = config.patch
        self.encoder = nn.Conv2d(shape.encoder_in, shape.features, config.patch, config.patch)
        self.decoder = nn.ConvTranspose2d(shape.decoder_in, shape.params, config.patch, config.patch)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z)


def test_a_backbone_is_a_config_a_class_and_a_line(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "toy", PatchBackbone)
    toy = Codec(_config(codec, backbone=PatchConfig(patch=4)))
    pixels = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    assert toy.decode_uint8(toy.encode(pixels).mode()).shape == pixels.shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaplaceConfig:
    kind: ClassVar[str] = "toy"
    scale: float


class Laplace(Likelihood):
    """Give a Laplace density of fixed scale."""

    params_per_channel = 1

    def check(self, x: torch.Tensor) -> None:
        if bool((x.abs() > 1).any()):
            raise ValueError("the laplace likelihood takes pixels in [-1, 1]")

    def _log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Laplace(params[0], self.config.scale).log_prob(x)

    def _mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[0]

    def _sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        u = torch.rand(params[0].shape, generator=generator) - 0.5
        return params[0] - self.config.scale * u.sign() * torch.log1p(-2 * u.abs())


def test_a_likelihood_is_a_config_a_class_and_a_line(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIKELIHOODS, "toy", Laplace)
    toy = Codec(_config(codec, likelihood=LaplaceConfig(scale=0.1)))
    x = torch.rand(1, 3, 8, 8) * 2 - 1
    loss = -toy.likelihood.log_prob(toy.likelihood_params(toy.encode(x).mode()), x).sum()
    loss.backward()
    assert all(p.grad is not None for p in toy.backbone.parameters())


class RawWriter(cache.ImageCacheWriter):
    """Write each draw as bare float32 numbers."""

    program = "toy"
    options_used = frozenset({"seed", "epoch"})
    flips = "left out"

    def name(self, entry: LatentsEntry) -> str:
        return f"{entry.path}.raw"

    def data(self, item: cache.CacheEntry) -> bytes:
        return item.z.numpy().tobytes()


def _read_raw(where: Path, options: CacheOptions, statistics: Any) -> Iterator[cache.FoundImage]:
    def load(path: Path) -> cache.StoredImage:
        return cache.StoredImage(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).view(4, 2, 2))

    return cache.images_in_files(where, ".raw", load)


def test_a_cache_format_is_a_module(codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy")
    module.FORMAT = cache.CacheFormat(RawWriter, _read_raw)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "latent_codec.interop.caches.toy", module)
    stored, toy = store(tmp_path / "latents", codec, flips=False), cast(CacheName, "toy")
    written = write_cache(stored.folder, tmp_path / "cache", toy, CacheOptions())
    assert written.summary.done == len(stored)
    read_cache(tmp_path / "cache", tmp_path / "back", toy, codec, CacheOptions())
    assert len(Latents(tmp_path / "back")) == len(stored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greet:
    """Greet someone."""

    name: tyro.conf.Positional[str]

    def run(self) -> int:
        print(f"hello {self.name}")
        return 0


def test_a_command_is_a_class_and_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    extended: Any = Union[Command, Annotated[Greet, tyro.conf.subcommand("greet")]]
    assert tyro.cli(extended, args=["greet", "you"]).run() == 0
    assert capsys.readouterr().out == "hello you\n"
    for command in get_args(Command):
        kind = get_args(command)[0]
        assert dataclasses.is_dataclass(kind) and callable(kind.run) and kind.__doc__
