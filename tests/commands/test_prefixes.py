"""Test latents of a prefix of the channels, from one end to the other: encode, read, convert, decode, evaluate."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latent_codec.export import export
from latent_codec.images.read import read_image
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.conftest import files_of
from tests.support.networks import TINY_LITE, config_of, make_codec
from tests.test_cli import Do, Run
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run


@pytest.fixture
def nested(do: Do, tmp_path: Path) -> Codec:
    """Write a model of four channels, of which two are a latent too, as nested.safetensors beside the photos."""
    path = tmp_path / "nested.safetensors"
    make_codec(dataclasses.replace(config_of(TINY_LITE), prefixes=(2, 4))).save(path)
    return export(path, path, data=(tmp_path / "photos",), images=3, half=False)


def encode(do: Do, channels: int, to: str) -> None:
    assert do(f"encode photos {to} --format safetensors --model nested.safetensors --channels {channels}").code == 0


def test_a_prefix_is_stored_scaled_and_decoded_as_the_first_channels(do: Do, nested: Codec) -> None:
    for channels, to in ((2, "short"), (4, "whole")):
        encode(do, channels, to)
    short, whole = (Latents(Path(name), normalize=True) for name in ("short", "whole"))
    for i in range(3):
        assert torch.equal(short.posterior(i).mean, whole.posterior(i).mean[:, :2])
        assert torch.equal(short.posterior(i).logvar, whole.posterior(i).logvar[:, :2])
    mean, std = (getattr(nested.statistics, name)[:2] for name in ("mean", "std"))
    drawn = dataclasses.replace(short.header).statistics
    assert drawn is not None and (drawn.mean, drawn.std) == (mean, std) and short[0].z.shape[0] == 2
    assert do("decode short out --model nested.safetensors").code == 0
    pixels = read_image("photos/a.png")[0]
    row = next(i for i, entry in enumerate(short.entries) if entry.path == "a.png")
    with torch.inference_mode():
        expected = nested.decode_uint8(short.posterior(row).mean)[0, :, : pixels.shape[1], : pixels.shape[2]]
    found = read_image("out/a.png.png")[0]
    assert (found.int() - expected.int()).abs().max() <= 1
    assert "first 2 channels" in do("info short").out


def test_a_prefix_is_converted_there_and_back(do: Do, nested: Codec, tmp_path: Path) -> None:
    (tmp_path / "photos" / "a.jpg").unlink()  # its cache would be named as that of a.png
    encode(do, 2, "short")
    assert do("convert short cache --to npy --scale normalized").code == 0
    assert all(np.load(path).shape[0] in (2, 4) for path in Path("cache").rglob("*.npy"))
    assert do("convert cache back --from npy --scale normalized --model nested.safetensors").code == 0
    assert Latents(Path("back"), model_id=nested.model_id).header.channels == 2


def test_info_and_evaluate_measure_prefixes(do: Do, nested: Codec) -> None:
    assert nested.statistics is not None
    assert nested.statistics.prefix_psnr == pytest.approx(_psnr(do), abs=0.02)
    two, four = (f"{value:.2f}" for value in nested.statistics.prefix_psnr)
    assert f"prefixes    2 channels {two} dB, 4 channels {four} dB: PSNR" in do("info nested.safetensors").out


def _psnr(do: Do) -> list[float]:
    found = []
    for channels in (2, 4):
        line = f"evaluate nested.safetensors photos --lpips-net none --channels {channels} --out results"
        assert do(line).code == 0
        results = json.loads(Path("results/results.json").read_text())
        assert results["about"]["channels"] == channels
        found.append(results["summary"]["psnr"])
    return found


@pytest.mark.usefixtures("nested")
def test_other_numbers_of_channels_are_refused(do: Do, run: Run) -> None:
    for line, message in (
        ("encode photos out --format safetensors --model nested.safetensors --channels 3", "has latents of 2, 4"),
        ("encode photos out --format safetensors --channels 3", "3 channels are no latent"),
        ("encode photos out --channels 2", "--channels is for --format safetensors"),
        ("evaluate nested.safetensors photos --channels 3 --lpips-net none", "has latents of 2, 4"),
        ("evaluate nested.safetensors photos --channels 2 --rd", "leave out --rd"),
    ):
        refused = do(line)
        assert refused.code == 2 and message in refused.err and not files_of(Path("out"))
