"""The benchmark of whole commands: it runs them, and counts what they did."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.errors import UserError
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig, DiagonalGaussianConfig, GaussianConfig
from tests.conftest import Draw
from tools.benchmark import __main__, commands
from tools.benchmark.diffusers_loop import Loop


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i in range(3):
        draw(tmp_path / "photos" / f"{i}.png", 24, 16, seed=i)
    return tmp_path / "photos"


def results(monkeypatch: pytest.MonkeyPatch, out: Path, *args: str | Path) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, args), "--out", f"{out}"])
    __main__.main()
    return json.loads(out.read_text())["results"]


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_rates_are_of_the_networks_and_of_whole_commands(
    photos: Path, tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    options = ["--model", model_file, "--count", "5", "--rounds", "1", "--batch-size", "2"]
    found = results(monkeypatch, tmp_path / "out.json", command, photos, *options)
    base = "encoder alone" if command == "encode" else "decoder alone"
    share = f"share_of_{base.replace(' ', '_')}"
    assert found[base][share] == 1
    commands = [row for name, row in found.items() if name.startswith(f"{command} ")]
    assert len(commands) >= 2
    for row in commands:
        assert 0 < row[share] < 1  # python takes its time to start
        assert row[share] < row[f"{share}_after_start"]
        assert row["seconds_in_stages"].keys() >= {"decode", "network", "writing"}


def test_memory_is_that_of_the_commands(
    photos: Path, tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = results(monkeypatch, tmp_path / "out.json", "memory", photos, "--counts", "2", "--model", model_file)
    assert found.keys() == {"info", "encode safetensors", "encode lc", "decode safetensors", "decode lc"}
    assert all(50 < row["peak_mb of 2"] < 4000 for name, row in found.items() if name != "info")


def test_a_command_that_fails_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code 2"):
        commands.run("tools.encode", tmp_path / "nowhere", tmp_path / "z")


def test_a_folder_is_filled_up_with_other_names(photos: Path, tmp_path: Path) -> None:
    files = sorted(commands.gather(str(photos), tmp_path / "z", 7).iterdir())
    assert [file.read_bytes() for file in files] == [(photos / f"{i % 3}.png").read_bytes() for i in range(7)]


def test_the_obvious_script_draws_from_the_same_posterior(photos: Path, tmp_path: Path) -> None:
    config = CodecConfig(
        image_channels=3,
        latent_channels=4,
        backbone=ConvConfig(
            widths=(8, 8), layers_per_block=1, groups=4, mid_attention=True, quant_conv=True, post_quant_conv=True
        ),
        bottleneck=DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0),
        likelihood=GaussianConfig(scale="fixed", sigma=0.1),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = Codec(config).eval()
        with torch.no_grad():
            codec.backbone.state_dict()["quant_conv.bias"][4:] = -29.0  # next to no variance: what is drawn is the mean
    codec.save(tmp_path / "conv.safetensors")
    with torch.random.fork_rng():
        Loop(src=photos, dst=tmp_path / "z", weights=tmp_path / "conv.safetensors", batch_size=2, workers=0).run()
    for name in ("0.png", "2.png"):
        z = torch.load(tmp_path / "z" / f"{name}.pt", weights_only=True)
        with torch.inference_mode():
            expected = codec.encode(commands.find_images(photos / name)[0].read().pixels[None]).mean[0]
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-3)
