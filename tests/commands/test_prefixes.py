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
from tests.support.prior import context_prior
from tests.test_cli import Do, Run
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run


@pytest.fixture
def nested(do: Do, tmp_path: Path) -> Codec:
    """Write a model of four channels, of which two are a latent too, as nested.safetensors beside the photos."""
    path = tmp_path / "nested.safetensors"
    make_codec(dataclasses.replace(config_of(TINY_LITE), prefixes=(2, 4))).save(path)
    made = export(path, path, data=(tmp_path / "photos",), images=3, half=False)
    context = context_prior((1, 1, 2), 8, seed=1, centred=True, levels=(1,), nested=True)
    assert made.priors is not None
    made.priors = made.priors._replace(context=context)
    made.save(path)
    return made


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


def test_evaluate_follows_links_if_asked_for(do: Do, nested: Codec) -> None:
    Path("linked").mkdir()
    Path("linked/in").symlink_to(Path("photos").absolute())
    line = "evaluate nested.safetensors linked --lpips-net none"
    assert do(line).code == 2
    assert "linked: 3 images" in do(f"{line} --follow-links").out


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
def test_a_file_is_decoded_or_trimmed_to_a_prefix(do: Do) -> None:
    """Both give the same picture; the trimmed file is smaller, and trimming it again changes nothing."""
    assert do("encode photos files --step 0.05 --model nested.safetensors").code == 0
    assert do("decode files whole --model nested.safetensors").code == 0
    assert do("decode files short --channels 2 --model nested.safetensors").code == 0
    trimmed = do("trim files trimmed --channels 2 --model nested.safetensors")
    assert (trimmed.code, trimmed.out.startswith("trimmed 3 of 3 images")) == (0, True)
    assert do("decode trimmed from_trimmed --model nested.safetensors").code == 0
    assert files_of(Path("from_trimmed")) == files_of(Path("short")) != files_of(Path("whole"))
    assert "the first 2 groups of channels" in do("info trimmed/a.png.lc --model nested.safetensors").out
    before, after = files_of(Path("files")), files_of(Path("trimmed"))
    assert before.keys() == after.keys() and all(len(after[name]) < len(before[name]) for name in before)
    assert do("trim trimmed again --channels 2 --model nested.safetensors").code == 0
    assert do("trim files all --channels 4 --model nested.safetensors").code == 0
    assert files_of(Path("again")) == after and files_of(Path("all")) == before
    assert "trimmed 0 of 3 images" in do("trim files trimmed --channels 2 --model nested.safetensors").out
    (Path("files") / "a.png.lc").write_bytes(b"damaged")
    damaged = do("trim files trimmed --channels 2 --model nested.safetensors")
    assert damaged.code == 1 and "a.png.lc" in damaged.err and after.items() < files_of(Path("trimmed")).items()


@pytest.mark.usefixtures("nested")
def test_other_numbers_of_channels_are_refused(do: Do, run: Run) -> None:
    assert do("encode photos files --model nested.safetensors").code == 0
    assert do("encode photos plain --prior factorized --model nested.safetensors").code == 0
    plain = do("trim plain none --channels 2 --model nested.safetensors")
    assert plain.code == 1 and "under a factorized prior, whose streams cannot be trimmed" in plain.err
    for line, message in (
        ("encode photos out --format safetensors --model nested.safetensors --channels 3", "has latents of 2, 4"),
        ("encode photos out --format safetensors --channels 3", "3 channels are no latent"),
        ("decode files out --channels 3 --model nested.safetensors", "has latents of 2, 4"),
        ("trim files out --channels 3 --model nested.safetensors", "has latents of 2, 4"),
        ("trim photos out --channels 2 --model nested.safetensors", "no .lc files there"),
        ("encode photos out --channels 2", "--channels is for --format safetensors"),
        ("evaluate nested.safetensors photos --channels 3 --lpips-net none", "has latents of 2, 4"),
        ("evaluate nested.safetensors photos --channels 2 --rd", "leave out --rd"),
    ):
        refused = do(line)
        assert refused.code == 2 and message in refused.err and not files_of(Path("out"))
