"""Test CONTRIBUTING.md: its table of places, and its steps to add a cache format and a command."""

import dataclasses
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
import tyro

from latent_codec.cli import Command
from latent_codec.interop.caches import cache
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.read import read_cache
from latent_codec.interop.caches.registry import CacheName
from latent_codec.interop.caches.write import write_cache
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsEntry
from latent_codec.model.codec import Codec
from latent_codec.model.config import BackboneConfig, LikelihoodConfig
from latent_codec.model.likelihoods import LIKELIHOODS
from latent_codec.model.networks import BACKBONES
from tests.support.caches import store
from tests.support.data import ROOT


def test_every_config_has_its_part_in_the_registry() -> None:
    assert {config.kind for config in get_args(BackboneConfig)} == set(BACKBONES)
    assert {config.kind for config in get_args(LikelihoodConfig)} == set(LIKELIHOODS)


def test_the_table_of_places_names_what_is_there() -> None:
    table = re.findall(r"^\| Where .*\| `(\S+)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(table) == 9
    for path, name in table:
        assert re.search(rf"^ *(def|class) {name}\b|^{name}\b", (ROOT / path).read_text(), re.MULTILINE), (path, name)


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
    extended: Any = Command | Greet
    assert tyro.cli(extended, args=["greet", "you"]).run() == 0 and capsys.readouterr().out == "hello you\n"
    assert all(dataclasses.is_dataclass(kind) and callable(kind.run) and kind.__doc__ for kind in get_args(Command))
